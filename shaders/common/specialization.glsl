// Specialisation constants of the attention kernels; csrc/attention/planner.cc sets them by index.
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 64;
layout(constant_id = 1) const uint SUBGROUP_SIZE = 32;
layout(constant_id = 2) const uint FEATURES = 0;      // FEATURE_* bits
layout(constant_id = 3) const uint HEAD_DIM = 64;     // as stored
layout(constant_id = 4) const uint TILE_ROWS = 64;    // rows of the tile that a workgroup owns
layout(constant_id = 5) const uint TILE_HEADS = 1;    // query heads of one KV head in a query tile
layout(constant_id = 6) const uint BLOCK_ROWS = 32;   // rows taken from the work list a step
layout(constant_id = 7) const uint BIAS_DTYPE = 0;
// Portable kernels only.
layout(constant_id = 8) const uint THREAD_ROWS = 8;    // rows of the tile that a thread multiplies
layout(constant_id = 9) const uint SLICE_COLUMNS = 32; // columns of head_dim in shared memory at once
layout(constant_id = 10) const uint VECTOR_ACCESS = 1; // rows are loaded and stored by four columns
// work_lists only.
layout(constant_id = 11) const uint TRANSPOSED = 0;    // 1: lists of queries by key tile
// Of calls with a plan.
layout(constant_id = 12) const uint SUPER_TILE_GRANULES = 64;

bool has(uint feature) { return (FEATURES & feature) != 0; }
