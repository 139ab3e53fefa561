#version 460
// Copies, to measure how fast the device's memory is read and written. Each thread copies COPIES
// quads, neighbours of those of its neighbours.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_control_flow_attributes : require

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 64;

const uint COPIES = 4;

layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer Source {
  uvec4 quad[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) writeonly restrict buffer Target {
  uvec4 quad[];
};

layout(push_constant) uniform Push {
  uvec2 source;
  uvec2 target;
};

void main() {
  uint group = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
  uint first = group * THREADS * COPIES + gl_LocalInvocationID.x;
  uvec4 quads[COPIES];
  [[unroll]] for (uint i = 0; i < COPIES; ++i) quads[i] = Source(source).quad[first + i * THREADS];
  [[unroll]] for (uint i = 0; i < COPIES; ++i) Target(target).quad[first + i * THREADS] = quads[i];
}
