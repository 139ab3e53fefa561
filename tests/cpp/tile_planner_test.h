#pragma once

#include "random_problem.h"

namespace jax_aat {

AttentionProblem RandomPlanning(Random& random);
void FuzzPlanning();
void FuzzRouting();
void FuzzMeans();

}  // namespace jax_aat
