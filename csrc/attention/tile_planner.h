// PlanTiles: the dispatches that make the plan of an adaptive call, or the prices it is made from.
#pragma once

#include "attention/dispatch_plan.h"
#include "attention/plan_builder.h"

namespace jax_aat {

// Of a problem of Pass::kPlan. Throws std::invalid_argument, in words for the user, when the device
// cannot serve it.
DispatchPlan PlanTiles(const AttentionProblem& problem, const DeviceTraits& traits);

}  // namespace jax_aat
