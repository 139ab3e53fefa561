#version 460
// Fills a range of 32-bit words with one value, where a result must be defined although no tile
// writes it.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require

layout(local_size_x_id = 0) in;

layout(buffer_reference, std430, buffer_reference_align = 4) writeonly buffer Words { uint word[]; };

layout(push_constant) uniform Push {
  uvec2 address;
  uint count;
  uint value;
};

void main() {
  for (uint i = gl_GlobalInvocationID.x; i < count; i += gl_NumWorkGroups.x * gl_WorkGroupSize.x) {
    Words(address).word[i] = value;
  }
}
