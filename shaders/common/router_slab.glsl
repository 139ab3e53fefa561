// What a workgroup of the router notes of the tile at work: its slab of scratch. Places are counted in
// floats; csrc/attention/tile_planner.cc knows the size (SlabFloats).
#include "common/sub_queries.glsl"

layout(buffer_reference, std430, buffer_reference_align = 4) buffer OwnFloats { float value[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer OwnPairs { vec2 value[]; };
// Read by other threads than have written them.
layout(buffer_reference, std430, buffer_reference_align = 4) coherent buffer SharedFloats {
  float value[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) coherent buffer SharedWords {
  uint value[];
};

// A kernel defines SHARED_MASS as true where its threads do not keep to granules; it may then round
// the variances, which only weigh errors, to halves.
#if SHARED_MASS
#define MassFloats SharedFloats
#define Variances SharedWords
#else
#define MassFloats OwnFloats
#define Variances OwnPairs
#endif

struct Slab {
  SharedVectors queries;      // see make_sub_queries
  // Of granules, by place:
  MassFloats log_mass;      // [sub-query][place]; -inf: not seen
  Variances variances;      // relative ones of the granule, of the super-tile, likewise
  SharedFloats importance;  // or NOT_SEEN
  SharedWords marks;        // MARK_* and, above, the place among the candidates plus 1
  SharedWords candidates;   // their places, ascending
  SharedFloats fine;        // [candidate][finer sub-query], see stage 2
  // Of super-tiles:
  SharedFloats super_logits;  // [super-tile][sub-query]
  // Where tiles look into the foremost:
  SharedFloats super_mass;        // likewise, logarithms
  SharedFloats super_importance;  // or NOT_SEEN
  SharedWords looked_into;        // the foremost, ascending
};

#define MARK_WHOLE 1u
#define MARK_SUPER_WHOLE 2u
#define MARK_BITS 2
#define NOT_SEEN -1.0

uvec2 offset_by(uvec2 address, uint floats) { return add_wide(address, multiply_wide(floats, 4)); }

// Of granules that something can be noted of at once.
uint place_count() { return PARAMS.judged_super_tiles * SUPER_TILE_GRANULES; }

Slab slab_of(uint workgroup) {
  uint granules = place_count();
  uvec2 at = view_of(OPERAND_ROUTER_SCRATCH, workgroup, 2).base;
  Slab slab;
  slab.queries = SharedVectors(at);
  at = offset_by(at, (SUBS + FINE_SUBS) * QUADS * 8);
  slab.variances = Variances(at);
  at = offset_by(at, SUBS * granules * 2);
  slab.log_mass = MassFloats(at);
  at = offset_by(at, SUBS * granules);
  slab.importance = SharedFloats(at);
  at = offset_by(at, granules);
  slab.marks = SharedWords(at);
  at = offset_by(at, granules);
  slab.candidates = SharedWords(at);
  at = offset_by(at, granules);
  slab.super_logits = SharedFloats(at);
  at = offset_by(at, SUBS * super_tile_count());
  if (FOREMOST != 0) {
    slab.super_mass = SharedFloats(at);
    at = offset_by(at, SUBS * super_tile_count());
    slab.super_importance = SharedFloats(at);
    at = offset_by(at, super_tile_count());
    slab.looked_into = SharedWords(at);
    at = offset_by(at, super_tile_count());
  }
  slab.fine = SharedFloats(at);
  return slab;
}

// Makes what threads have written to shared parts of the slab visible to the others.
void sync_slab() {
  memoryBarrierBuffer();
  barrier();
}

#if SHARED_MASS
const float VARIANCE_UNIT = 8192.0;  // the largest variance is below 8 and a half below 65,504

void store_variances(Slab slab, uint place, vec2 variances) {
  slab.variances.value[place] = packHalf2x16(variances * VARIANCE_UNIT);
}
vec2 load_variances(Slab slab, uint place) {
  return unpackHalf2x16(slab.variances.value[place]) / VARIANCE_UNIT;
}
#else
void store_variances(Slab slab, uint place, vec2 variances) { slab.variances.value[place] = variances; }
vec2 load_variances(Slab slab, uint place) { return slab.variances.value[place]; }
#endif
