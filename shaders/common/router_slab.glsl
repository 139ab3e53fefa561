// What a workgroup of the router notes of the tile at work: its slab of scratch. Places are counted in
// floats; csrc/attention/tile_planner.cc knows the size (SlabFloats).
#include "common/sub_queries.glsl"

// All are read by other threads than have written them.
layout(buffer_reference, std430, buffer_reference_align = 16) SHARED_BY buffer SharedQuads {
  uvec4 quad[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) SHARED_BY buffer SharedFloats {
  float value[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) SHARED_BY buffer SharedWords {
  uint value[];
};

struct Slab {
  SharedVectors queries;  // see make_sub_queries
  // Of granules, by place, what lies together being of one granule:
  SharedVectors log_mass;  // [place][sub-query / 4]
  SharedQuads variances;   // relative ones of the granule, and what its super-tile adds, likewise
  SharedVectors fine;      // [candidate][finer sub-query / 4], see stage 2
  SharedWords candidates;  // their places, ascending
  SharedWords notes;       // see common/ranking.glsl
  SharedFloats super_logits;  // of super-tiles: [super-tile][sub-query]
  // Of key tiles, where tiles look into the foremost:
  SharedVectors key_tile_mass;  // [key tile][sub-query / 4], logarithms
  SharedWords looked_into;      // the foremost, ascending
  SharedWords is_looked_into;   // by key tile
};

uvec2 offset_by(uvec2 address, uint floats) { return add_wide(address, multiply_wide(floats, 4)); }

// Of granules that something can be noted of at once.
uint place_count() { return PARAMS.judged_key_tiles * KEY_TILE_GRANULES; }
uint note_count() { return FOREMOST != 0 ? max(place_count(), key_tile_count()) : place_count(); }
// That stage 2 looks at, at most.
uint candidate_count() {
  uint wanted = uint(ceil(PARAMS.candidate_share * float(granule_count())));
  return min(wanted, place_count());
}

// Of sub-queries; those that are halves are rows of matrices, of which stage 1 takes 16.
const uint STAGE_2_SUBS = STAGES > 1 ? FINE_SUBS : 0;
const uint QUERY_FLOATS =
    KEYS_IN_HALVES ? (16 + STAGE_2_SUBS) * QUADS * 4 : (SUBS + STAGE_2_SUBS) * QUADS * 8;

Slab slab_of(uint workgroup) {
  uvec2 at = view_of(OPERAND_ROUTER_SCRATCH, workgroup, 2).base;
  Slab slab;
  slab.queries = SharedVectors(at);
  at = offset_by(at, QUERY_FLOATS);
  slab.log_mass = SharedVectors(at);
  at = offset_by(at, place_count() * SUB_QUADS * 4);
  slab.variances = SharedQuads(at);
  at = offset_by(at, place_count() * SUB_QUADS * 4);
  slab.fine = SharedVectors(at);
  at = offset_by(at, candidate_count() * FINE_SUBS);
  if (FOREMOST != 0) {
    slab.key_tile_mass = SharedVectors(at);
    at = offset_by(at, key_tile_count() * SUB_QUADS * 4);
  }
  slab.candidates = SharedWords(at);
  at = offset_by(at, place_count());
  slab.notes = SharedWords(at);
  if (SHARED_NOTES == 1) at = offset_by(at, note_count());
  if (FOREMOST != 0) {
    slab.looked_into = SharedWords(at);
    at = offset_by(at, key_tile_count());
    slab.is_looked_into = SharedWords(at);
    at = offset_by(at, key_tile_count());
  }
  slab.super_logits = SharedFloats(at);
  return slab;
}

// Makes what threads have written to the slab visible to the others.
void sync_slab() {
#ifdef SHARED_IN_WORKGROUP
  controlBarrier(gl_ScopeWorkgroup, gl_ScopeWorkgroup,
                 gl_StorageSemanticsBuffer | gl_StorageSemanticsShared,
                 gl_SemanticsAcquireRelease | gl_SemanticsMakeAvailable | gl_SemanticsMakeVisible);
#else
  memoryBarrierBuffer();
  barrier();
#endif
}

// Variances only weigh errors, so they are rounded to halves: the largest is below 8.
const float VARIANCE_UNIT = 8192.0;

// Of a place and a sub-query: the logarithm of its mass, and its relative variances.
void store_mass(Slab slab, uint place, uint sub, float mass) {
  SharedFloats(uvec2(slab.log_mass)).value[place * (4 * SUB_QUADS) + sub] = mass;
}
void store_variances(Slab slab, uint place, uint sub, vec2 variances) {
  SharedWords(uvec2(slab.variances)).value[place * (4 * SUB_QUADS) + sub] =
      packHalf2x16(variances * VARIANCE_UNIT);
}

// Of a candidate and a finer sub-query.
void store_fine(Slab slab, uint candidate, uint fine, float mass) {
  SharedFloats(uvec2(slab.fine)).value[candidate * FINE_SUBS + fine] = mass;
}

// Of all sub-queries; those past SUBS mean nothing.
void load_masses(Slab slab, uint place, out vec4 mass[SUB_QUADS]) {
  [[unroll]] for (uint i = 0; i < SUB_QUADS; ++i) {
    mass[i] = slab.log_mass.vector[place * SUB_QUADS + i];
  }
}
void load_variances(Slab slab, uint place, out uvec4 variances[SUB_QUADS]) {
  [[unroll]] for (uint i = 0; i < SUB_QUADS; ++i) {
    variances[i] = slab.variances.quad[place * SUB_QUADS + i];
  }
}
vec2 unpack_variances(uint word) { return unpackHalf2x16(word) / VARIANCE_UNIT; }
