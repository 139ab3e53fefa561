// Of a planning kernel that runs in several dispatches: which one this is.
layout(constant_id = 13) const uint STAGE = 0;
