// Few tiles of queries may see very many keys, as in a step of decoding. Then several workgroups share
// the list of one: each attends to a part of it and leaves a record of every row, float32, which
// merge_parts.comp merges: quads of out, then one of the maximum of its scores, the sum of their powers
// relative to that, and the shares by level. (A logsumexp would not do: that of scores near the least
// float32 says nothing of their number.)
#include "common/parts.glsl"
#include "common/work_list.glsl"

const uint OUT_QUADS = (HEAD_DIM + 3) / 4;
const uint RECORD_QUADS = OUT_QUADS + 1;

// Of so many blocks those before a part.
uint blocks_before(uint blocks, uint part) {
  return blocks / LIST_PARTS * part + min(blocks % LIST_PARTS, part);
}

WorkList part_of(WorkList list, uint part) {
  uint first = blocks_before(list.blocks, part), end = blocks_before(list.blocks, part + 1);
  uint coarse_blocks = divide_up(list.coarse_rows, BLOCK_ROWS);
  uint first_coarse = blocks_before(coarse_blocks, part) * BLOCK_ROWS;
  uint end_coarse = min(blocks_before(coarse_blocks, part + 1) * BLOCK_ROWS, list.coarse_rows);
  return WorkList(list.entries, list.first_entry + first * BLOCK_GRANULES,
                  clamp(list.full_blocks, first, end) - first, end - first,
                  list.first_coarse_entry + first_coarse, end_coarse - first_coarse);
}

// Of a row of the batch entry at work.
Quads record_of(uint head, uint position, uint part) {
  uint row = (batch_entry * PARAMS.query_heads + head) * PARAMS.queries + position;
  uvec2 base = uvec2(PARAMS.operand[OPERAND_RECORDS].address_low,
                     PARAMS.operand[OPERAND_RECORDS].address_high);
  return Quads(add_wide(base, multiply_wide(row * LIST_PARTS + part, RECORD_QUADS * 16)));
}
