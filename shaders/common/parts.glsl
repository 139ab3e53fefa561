// Workgroups that share the work list of a tile, where tiles are few and lists long. Each takes a part
// of the list; a kernel of its own puts together what the parts give.
layout(constant_id = 13) const uint LIST_PARTS = 1;
