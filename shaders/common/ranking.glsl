// Notes of a word for each granule, or key tile, at work: what the tile may see of it and, above, the
// bits of its importance, by which the foremost are chosen. They lie in shared memory where they fit.

#define MARK_SEEN 1u
#define MARK_WHOLE 2u
#define MARK_SUPER_WHOLE 4u
#define MARK_CHOSEN 8u
#define MARKS 127u
#define KEY_BITS 24  // of importance without its sign: to 2^-16 of it

shared uint shared_notes[SHARED_NOTES];

uint note_of(uint i) {
  if (SHARED_NOTES != 1) return shared_notes[i];
  return slab.notes.value[i];
}

void set_note(uint i, uint note) {
  if (SHARED_NOTES != 1) {
    shared_notes[i] = note;
  } else {
    slab.notes.value[i] = note;
  }
}

bool is_seen(uint note) { return (note & MARK_SEEN) != 0; }
bool is_chosen(uint note) { return (note & MARK_CHOSEN) != 0; }
uint key_of(uint note) { return (note >> 7) & 0xffffffu; }
uint with_importance(uint note, float importance) {
  return (note & MARKS) | (floatBitsToUint(importance) & ~MARKS);
}

// Of what is seen from `first` to `end`: the key of the n-th largest importance, or 0 where there are
// fewer, and how many are larger.
uvec2 nth_key(uint first, uint end, uint n) {
  uint prefix = 0, known = 0, above = 0;
  for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
    barrier();
    for (uint i = gl_LocalInvocationID.x; i < 256; i += THREADS) histogram[i] = 0;
    barrier();
    for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
      uint note = note_of(i), key = key_of(note);
      if (is_seen(note) && (key & known) == prefix) {
        atomicAdd(histogram[(key >> shift) & 255u], 1u);
      }
    }
    uvec2 bin = find_bin(n - above);
    prefix |= bin.x << shift;
    known |= 255u << shift;
    above += bin.y;
  }
  return uvec2(prefix, above);
}

// Lists and marks the n most important of what is seen from `begin` to `end`, in ascending order; of
// equals the first.
void choose(uint begin, uint end, uint n, SharedWords chosen) {
  uvec2 least = nth_key(begin, end, n);
  uint each = divide_up(end - begin, THREADS);
  uint first = min(begin + gl_LocalInvocationID.x * each, end);
  end = min(first + each, end);
  uvec2 own = uvec2(0);
  for (uint i = first; i < end; ++i) {
    uint note = note_of(i), key = key_of(note);
    if (is_seen(note)) own += uvec2(key > least.x, key == least.x);
  }
  uvec2 before = uvec2(scan(own.x), scan(own.y)) - own;
  uint room = n - least.y;
  for (uint i = first; i < end; ++i) {
    uint note = note_of(i), key = key_of(note);
    if (!is_seen(note)) continue;
    bool equal = key == least.x;
    if (key > least.x || (equal && before.y < room)) {
      chosen.value[before.x + min(before.y, room)] = i;
      set_note(i, note | MARK_CHOSEN);
    }
    before += uvec2(key > least.x, equal);
  }
}
