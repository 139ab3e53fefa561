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

// Operand slots. 0-16 cross the FFI boundary (bit i of the `operands` and `results` attributes);
// the rest is scratch of one call.
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
#define OPERAND_DELTA 17        // float32 [batch, queries, query_heads]: sum(dout * out) - dlse
#define OPERAND_LISTS 18        // uint: work lists by query tile, see common/work_list.glsl
#define OPERAND_KEY_LISTS 19    // uint: the transposed lists, by key tile, for dK and dV
#define OPERAND_COUNT 20

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

// Rows with no key to attend to get this logsumexp (finite, float32): -0.7 * the largest float32.
#define EMPTY_LOGSUMEXP (-2.3819763e38f)

// Where one operand lies. Strides in elements; 0 along an axis that is broadcast.
struct OperandLayout {
  uint address_low;
  uint address_high;
  uint batch_stride[MAX_BATCH_AXES];
  uint row_stride;     // along queries or keys
  uint head_stride;    // along query heads or key/value heads
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
  // Work lists are shared where no operand tells tiles of different batch entries or heads apart:
  // the list of (batch index b, head chunk h) is sum(b_i * list_batch_stride[i]) + h * list_head_stride.
  uint list_batch_stride[MAX_BATCH_AXES];
  uint list_head_stride;  // by query-head chunk (OPERAND_LISTS)
  uint key_list_head_stride;  // by key/value head (OPERAND_KEY_LISTS)
  uint list_capacity;         // entries that one list may take
  uint key_list_capacity;
  OperandLayout operand[OPERAND_COUNT];
};

#ifdef __cplusplus
}  // namespace jax_aat
#endif
#endif
