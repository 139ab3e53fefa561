#pragma once

#include "attention/dispatch_plan.h"
#include "random_problem.h"

namespace jax_aat {

// Names shapes for all kernels of a problem: those that fit it, and any others.
void AddRandomTuning(Random& random, const AttentionProblem& problem, DeviceTraits& traits);

// Each kernel of the plan has the shape that the tuning names where that fits, else the first.
void CheckTuned(const AttentionProblem& problem, const DeviceTraits& traits,
                const DispatchPlan& plan);

void TestShapes();

}  // namespace jax_aat
