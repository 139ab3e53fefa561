// The parameter block of every attention shader, defined once for C++ and GLSL.
//
// C++ includes it from csrc/attention/problem.h, GLSL from common/problem.glsl.
// Only 4-byte members, so that std430 and the C++ ABI lay it out alike.
#ifndef JAX_AAT_SHADERS_COMMON_PARAMS_H
#define JAX_AAT_SHADERS_COMMON_PARAMS_H

#ifdef __cplusplus
#include <cstdint>
namespace jax_aat {
using uint = std::uint32_t;
#endif

// Operand slots. Those up to PREVIOUS_LEVELS cross the FFI boundary (bit i of the `operands` and
// `results` attributes); the rest is scratch of one call. Work lists are scratch where no plan gives
// them, prices where only levels are wanted.
#define OPERAND_Q 0
#define OPERAND_K 1
#define OPERAND_V 2
#define OPERAND_BIAS 3
#define OPERAND_MASK 4
#define OPERAND_Q_LENGTHS 5
#define OPERAND_KV_LENGTHS 6
#define OPERAND_Q_SEGMENTS 7
#define OPERAND_KV_SEGMENTS 8
#define OPERAND_OUT 9
#define OPERAND_LSE 10
// Tangents of q, k, v, bias (inputs of tangent) or their gradients (results of backward).
#define OPERAND_DQ 11
#define OPERAND_DK 12
#define OPERAND_DV 13
#define OPERAND_DBIAS 14
// Tangents of out and logsumexp (results of tangent) or their cotangents (inputs of backward).
#define OPERAND_DOUT 15
#define OPERAND_DLSE 16
// Coarse rows: the mean of each granule, then of each super-tile.
#define OPERAND_COARSE_K 17
#define OPERAND_COARSE_V 18
#define OPERAND_LEVEL_BIAS 19  // added to the scores of coarse rows, by level
// The plan: levels of granules, and the work lists made of them (common/work_list.glsl).
#define OPERAND_LEVELS 20
#define OPERAND_LIST_HEADERS 21  // by query tile
#define OPERAND_LIST_ENTRIES 22
#define OPERAND_KEY_LIST_HEADERS 23  // by key tile, for dk and dv
#define OPERAND_KEY_LIST_ENTRIES 24
#define OPERAND_SHARES 25  // of the softmax that coarse rows hold, by level
#define OPERAND_DCOARSE_K 26
#define OPERAND_DCOARSE_V 27
#define OPERAND_DLEVEL_BIAS 28
#define OPERAND_DSHARES 29
#define OPERAND_ROW_COUNTS 30  // rows that a query was multiplied with: exact, coarse
// Of a call that makes a plan:
#define OPERAND_PRICES 31           // two of each granule, by query tile (common/prices.glsl)
#define OPERAND_SPARE_ROWS 32       // that the tiles of a batch entry may read
#define OPERAND_LAMBDA 33           // price of a row, by list
#define OPERAND_PREVIOUS_LEVELS 34
#define OPERAND_DELTA 35           // float32 [batch, queries, query_heads]: sum(dout * out) - dlse
#define OPERAND_KEY_SUMMARIES 36
#define OPERAND_ROUTER_SCRATCH 37
#define OPERAND_HISTOGRAM 38       // of prices (plan_price.comp)
#define OPERAND_SEGMENT_RANGES 39  // smallest and largest ids (common/boundary.glsl)
#define OPERAND_SCORE_GRADIENTS 40  // common/score_gradients.glsl
// Of a call that makes its coarse rows, by super-tile: the state; and by as many queries its gradient.
#define OPERAND_STATE 41  // common/state.glsl
#define OPERAND_DSTATE 42
#define OPERAND_WORK_COUNTS 43  // count_work.comp, for a profile
#define OPERAND_RECORDS 44  // of rows by parts of lists (common/query_parts.glsl)
#define OPERAND_COUNT 45

#define MAX_BATCH_AXES 4

// Element types of an operand as stored.
#define DTYPE_F32 0
#define DTYPE_F16 1
#define DTYPE_BF16 2

// Bits of the specialisation constant FEATURES: what a pipeline must handle.
#define FEATURE_CAUSAL 1
#define FEATURE_WINDOW 2
#define FEATURE_Q_LENGTHS 4
#define FEATURE_KV_LENGTHS 8
#define FEATURE_SEGMENTS 16
#define FEATURE_MASK 32
#define FEATURE_BIAS 64
#define FEATURE_SOFT_CAP 128
#define FEATURE_DQ 256       // tangent of q given (tangent) or gradient of q wanted (backward)
#define FEATURE_DK 512
#define FEATURE_DV 1024
#define FEATURE_DBIAS 2048
#define FEATURE_DOUT 4096    // cotangent of out given (backward)
#define FEATURE_DLSE 8192    // cotangent of logsumexp given (backward)
#define FEATURE_CAREFUL 16384  // second pass of a kernel, over the tiles that the first has marked
#define FEATURE_PLAN 32768     // levels, work lists and coarse rows are given
#define FEATURE_LEVEL_BIAS 65536
#define FEATURE_DCOARSE_K 131072
#define FEATURE_DCOARSE_V 262144
#define FEATURE_DLEVEL_BIAS 524288
#define FEATURE_DSHARES 1048576      // cotangent of shares given (backward)
#define FEATURE_SHARES 1048576       // shares wanted (forward)
#define FEATURE_ROW_COUNTS 2097152   // row counts wanted (forward)
#define FEATURE_COARSE_TILE 4194304  // the kernel's key tiles are of coarse rows (backward)
// What a call that makes a plan is given:
#define FEATURE_PRICES 8388608
#define FEATURE_SPARE_ROWS 16777216  // else lambda
#define FEATURE_PREVIOUS_LEVELS 33554432
#define FEATURE_MAKES_LISTS 67108864  // levels and lists are wanted, not prices
#define FEATURE_MAKES_KEY_LISTS 1073741824  // and transposed lists, which backward passes walk
#define FEATURE_SCORE_GRADIENTS 134217728  // the kernel stores dS for the one that makes dq of it
#define FEATURE_RELAYS 2147483648u  // the layout of matrices is not known (common/coopmat_layout.glsl)
// Of a call with a plan:
#define FEATURE_MAKES_MEANS 268435456  // coarse rows are made of k and v
#define FEATURE_CORRECTS 536870912     // and corrected by the state

// Rows with no key to attend to get this logsumexp (finite, float32): -0.7 * the largest float32.
#define EMPTY_LOGSUMEXP (-2.3819763e38f)

// Where one operand lies. Strides in elements; 0 along an axis that is broadcast.
struct OperandLayout {
  uint address_low;
  uint address_high;
  uint batch_stride[MAX_BATCH_AXES];
  uint row_stride;     // along queries or keys; of levels and list headers along tiles
  uint head_stride;    // along query heads or key/value heads; of the plan along lists
  uint column_stride;  // along head_dim; for bias and mask along keys
};

struct AttentionParams {
  uint batch[MAX_BATCH_AXES];  // extents, the last axis innermost; unused axes are 1
  uint batch_count;            // their product
  uint queries;
  uint keys;
  uint query_heads;
  uint kv_heads;
  uint head_dim;
  int window_left;   // keys further left than this are hidden; < 0: unbounded
  int window_right;
  float scale;
  float soft_cap;
  uint list_capacity;  // entries of one work list: of all query tiles of a head chunk
  uint key_list_capacity;
  uint score_gradient_heads;  // key/value heads whose dS there is room for
  // Of a plan:
  uint plan_positions;  // of a query tile; a power of two
  uint plan_tiles;      // of queries
  uint coarse_rows;  // of granules and super-tiles
  // Of a call that makes one:
  uint level_count;       // levels in use: 1: exact or hidden, 2: means of granules, 3: of super-tiles
  float candidate_share;  // of the granules that a tile sees, those that the router judges twice
  float floor_share;      // those exact for their importance; see NEAR in common/router.glsl
  uint judged_key_tiles;  // that a tile looks into: all, or the foremost
  uint priced_key_tiles;  // of a row of prices; 0: it has those of all granules (common/prices.glsl)
  OperandLayout operand[OPERAND_COUNT];
  uint super_tile_granules;  // shaders have it as a constant
};

#ifdef __cplusplus
}  // namespace jax_aat
#endif
#endif
