// Cooperative matrices of a device that lays them out in another way than common/coopmat_types.glsl
// says. Its kernels are the same: where they look at single elements, the first LANE_ELEMENTS of a
// lane's are made to be those of element_row and element_column, through shared memory, and given back
// before the matrix is multiplied with. Where the layout is the known one, nothing of this is done.
#include "common/coopmat_types.glsl"
#include "common/specialization.glsl"

const bool RELAYS = (FEATURES & FEATURE_RELAYS) != 0;
const uint RELAY_PITCH = 5;  // vectors from one row to the next: odd, to meet all banks

// 16 rows of each subgroup, aligned as matrices have to be.
shared uvec4 relay[RELAYS ? THREADS / 32 * 16 * RELAY_PITCH : 1];

uint relay_start() { return gl_SubgroupID * 16 * RELAY_PITCH; }

// Word `column` of the row of a lane's element i.
#define RELAY_WORD(i, column) \
  relay[relay_start() + element_row(i) * RELAY_PITCH + (column) / 4][(column) % 4]

// Two numbers that elements hold exactly.
uint packed_pair(float first, float second) {
  if (DTYPE == DTYPE_F16) return packHalf2x16(vec2(first, second));
  return floatBitsToUint(first) >> 16 | (floatBitsToUint(second) & 0xffff0000u);
}

void to_known(inout Accumulator x) {
  if (!RELAYS) return;
  coopMatStore(x, relay, relay_start(), RELAY_PITCH, ROW_MAJOR);
  sync_subgroup();
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
    x[i] = uintBitsToFloat(RELAY_WORD(i, element_column(i)));
  }
  sync_subgroup();
}

void to_own(inout Accumulator x) {
  if (!RELAYS) return;
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
    RELAY_WORD(i, element_column(i)) = floatBitsToUint(x[i]);
  }
  sync_subgroup();
  coopMatLoad(x, relay, relay_start(), RELAY_PITCH, ROW_MAJOR);
  sync_subgroup();
}

void to_own(inout Left x) {
  if (!RELAYS) return;
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
    RELAY_WORD(i, element_column(i) / 2) = packed_pair(float(x[i]), float(x[i + 1]));
  }
  sync_subgroup();
  coopMatLoad(x, relay, relay_start(), RELAY_PITCH, ROW_MAJOR);
  sync_subgroup();
}
