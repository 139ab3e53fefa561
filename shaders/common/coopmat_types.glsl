// Cooperative matrices of the *_coopmat kernels: 16x16x16 at subgroup scope on 32 lanes, 16-bit
// factors, float32 accumulators.
//
// Which elements a lane holds is left open by the specification. Kernels assume that element i of a
// lane lies in row element_row(i), column element_column(i), of an accumulator and of a left factor
// alike, so that a score becomes a left factor by copying elements. The runtime probes it
// (coopmat_layout_probe.comp); where it is not so, elements make a trip through shared memory
// (common/coopmat_layout.glsl).
#define CALL_IN_MEMORY
#include "common/params.h"

#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_KHR_shader_subgroup_ballot : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#if DTYPE == DTYPE_BF16
#extension GL_EXT_bfloat16 : require
#define Element bfloat16_t
#define ElementPair bf16vec2
#else
#define Element float16_t
#define ElementPair f16vec2
#endif

#define Left coopmat<Element, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define Right coopmat<Element, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>
#define Rounded coopmat<Element, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define Accumulator coopmat<float, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define ROW_MAJOR gl_CooperativeMatrixLayoutRowMajor
#define COLUMN_MAJOR gl_CooperativeMatrixLayoutColumnMajor

const uint LANE_ELEMENTS = 8;  // of a matrix
const uint LANE_ROWS = 2;      // of a matrix that a lane holds elements of; its quad holds the same
const uint LANE_COLUMNS = 4;

uint lane_row(uint h) { return gl_SubgroupInvocationID / 4 + 8 * h; }
uint lane_column(uint c) { return 2 * (gl_SubgroupInvocationID % 4) + (c & 1) + 8 * (c >> 1); }

uint element_row(uint i) { return lane_row(i / LANE_COLUMNS); }
uint element_column(uint i) { return lane_column(i % LANE_COLUMNS); }

// Shows the lanes of a subgroup what others of them wrote to shared memory.
void sync_subgroup() {
  subgroupMemoryBarrierShared();
  subgroupBarrier();
}

float quad_max(float x) {
  x = max(x, subgroupShuffleXor(x, 1));
  return max(x, subgroupShuffleXor(x, 2));
}

float quad_sum(float x) {
  x += subgroupShuffleXor(x, 1);
  return x + subgroupShuffleXor(x, 2);
}
