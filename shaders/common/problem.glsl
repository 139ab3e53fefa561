// The call as a shader sees it: the parameter block, and where an operand's slice of one batch
// entry and head lies. Addresses are 64 bits in a uvec2, so that no 64-bit integers are needed;
// indices inside a slice are below 2^31.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_control_flow_attributes : require

#include "common/params.h"
#include "common/specialization.glsl"

layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer ParamsBlock {
  AttentionParams params;
};

// Kernels whose workgroups own a tile of a head work on `launched_heads` heads from
// `first_launched_head` on.
layout(push_constant) uniform Push {
  uvec2 params_address;
  uint first_launched_head;
  uint launched_heads;
};

#define PARAMS ParamsBlock(params_address).params

// The parameters that inner loops need, copied once, as a compiler must not keep what it loads
// through an address across a barrier. Kernels short of registers define CALL_IN_MEMORY.
#ifdef CALL_IN_MEMORY
#define call PARAMS
void load_call() {}
#else
struct Call {
  uint queries;
  uint keys;
  int window_left;
  int window_right;
  float scale;
  float soft_cap;
};
Call call;

void load_call() {
  call = Call(PARAMS.queries, PARAMS.keys, PARAMS.window_left, PARAMS.window_right, PARAMS.scale,
              PARAMS.soft_cap);
}
#endif

// The batch entry at work, and its index along each axis.
uint batch_entry;
uint batch_index[MAX_BATCH_AXES];

// At the start of a kernel: chooses the batch entry, and loads the call.
void set_batch(uint entry) {
  load_call();
  batch_entry = entry;
  [[unroll]] for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    uint extent = PARAMS.batch[axis];
    batch_index[axis] = entry % extent;
    entry /= extent;
  }
}

uint workgroup_index() { return gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x; }

uint divide_up(uint value, uint divisor) { return (value + divisor - 1) / divisor; }

uvec2 add_wide(uvec2 a, uvec2 b) {
  uint carry;
  uint low = uaddCarry(a.x, b.x, carry);
  return uvec2(low, a.y + b.y + carry);
}

uvec2 multiply_wide(uint a, uint b) {
  uint high, low;
  umulExtended(a, b, high, low);
  return uvec2(low, high);
}

// One operand at one batch entry, from one head on. Strides in elements.
struct View {
  uvec2 base;
  uint row_stride;
  uint head_stride;
  uint column_stride;
};

// `log2_bytes`: of an element's size, 0 to 2.
View view_of(uint slot, uint head, uint log2_bytes) {
  uvec2 elements = multiply_wide(head, PARAMS.operand[slot].head_stride);
  [[unroll]] for (uint axis = 0; axis < MAX_BATCH_AXES; ++axis) {
    elements = add_wide(
        elements, multiply_wide(batch_index[axis], PARAMS.operand[slot].batch_stride[axis]));
  }
  uvec2 bytes = uvec2(elements.x << log2_bytes,
                      (elements.y << log2_bytes) | ((elements.x >> 1) >> (31 - log2_bytes)));
  uvec2 address = uvec2(PARAMS.operand[slot].address_low, PARAMS.operand[slot].address_high);
  return View(add_wide(address, bytes), PARAMS.operand[slot].row_stride,
              PARAMS.operand[slot].head_stride, PARAMS.operand[slot].column_stride);
}

// Index of the first element of a row; `head` counts from the view's.
uint row_start(View view, uint position, uint head) {
  return position * view.row_stride + head * view.head_stride;
}
