#pragma once

#include "random_problem.h"

namespace jax_aat {

AttentionProblem RandomPlanning(Random& random);
void TestSharedNotes();
void FuzzPlanning();
void FuzzRouting();
void FuzzMeans();
void TestCorrection();
void TestScratchOfPlans();
void TestPlanningInOut();
void TestShares();

}  // namespace jax_aat
