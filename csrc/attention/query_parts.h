// How many workgroups share the work list of a tile of queries in the forward pass, where tiles are
// few and lists long: a step of decoding (shaders/common/query_parts.glsl).
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace jax_aat {

// The parts of the list of a tile of so many rows; 1: it is not shared. They depend on the sizes of
// one head alone, so that a batch entry gets the same bits in every batch.
std::uint32_t QueryListParts(const AttentionProblem& problem, std::uint32_t tile_rows);

// Bytes of the records of so many parts.
std::uint64_t RecordBytes(const AttentionProblem& problem, std::uint32_t parts);

}  // namespace jax_aat
