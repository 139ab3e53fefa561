// Shapes of kernels: the first is what rules choose, all fit the device, and a tuning chooses among
// them and nowhere else.
#include "tuning_test.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <memory>
#include <set>

#include "attention/example_plan.h"
#include "attention/tuning.h"

namespace jax_aat {
namespace {

constexpr Kernel kKernels[] = {Kernel::kForward, Kernel::kTangent, Kernel::kBackwardDq,
                               Kernel::kBackwardDkv};

// What the shaders keep in shared memory (shaders/common/products.glsl), but for a few bytes a row.
struct Planes {
  std::uint32_t tile, score;
};

Planes PlanesOf(Kernel kernel) { return kernel == Kernel::kForward ? Planes{1, 1} : Planes{2, 2}; }

std::uint32_t LeastSharedBytes(Kernel kernel, const KernelShape& shape, std::uint32_t head_dim) {
  const Planes planes = PlanesOf(kernel);
  const std::uint32_t slice_stride = shape.slice_columns / 4 + 1;
  const std::uint32_t score_stride = shape.block_rows / 4 + 1;
  const std::uint32_t tile_planes = head_dim > shape.slice_columns ? 1 : planes.tile;
  return 16 * (tile_planes * shape.tile_rows * slice_stride + shape.block_rows * slice_stride +
               planes.score * shape.tile_rows * score_stride);
}

void CheckPortableShape(Kernel kernel, const AttentionProblem& problem, const DeviceTraits& traits,
                        const KernelShape& shape) {
  const AttentionParams& params = problem.params;
  EXPECT(LeastSharedBytes(kernel, shape, params.head_dim) <= traits.max_shared_memory);
  EXPECT(shape.threads == shape.tile_rows / shape.thread_rows * 8);
  EXPECT(shape.threads >= shape.tile_rows && shape.threads <= traits.max_workgroup_invocations);
  EXPECT(shape.thread_rows <= 8 && shape.tile_rows % shape.thread_rows == 0);
  EXPECT(shape.tile_rows % TileHeads(params) == 0 && shape.block_rows % 16 == 0);
  EXPECT(shape.slice_columns >= 32 && DivideUp(params.head_dim, shape.slice_columns) <= 4);
}

void CheckShapes(Kernel kernel, const AttentionProblem& problem, const DeviceTraits& traits) {
  const KernelChoice choice = ShapesOf(kernel, problem, traits);
  EXPECT(choice.family != nullptr && !choice.shapes.empty() && choice.shapes.size() <= 6);
  std::set<ShapeNumbers> different;
  for (const KernelShape& shape : choice.shapes) {
    EXPECT(different.insert(NumbersOf(shape)).second);
    EXPECT(std::strcmp(shape.shader, choice.shapes.front().shader) == 0);
    if (problem.features & FEATURE_PLAN) {
      const bool by_key = kernel == Kernel::kBackwardDkv;
      EXPECT((by_key ? shape.block_rows : shape.tile_rows) <= PlanTileRows(problem.params));
    }
    if (std::strcmp(choice.family->path, "portable") == 0) {
      CheckPortableShape(kernel, problem, traits, shape);
    }
  }
}

// What rules choose: rows of a tile, of a block and of
// a thread, columns of a slice, for the kernels in their order.
struct Recorded {
  std::uint32_t subgroup_size, shared_memory, head_dim;
  std::array<std::array<std::uint32_t, 4>, 4> shapes;
};

constexpr Recorded kRecorded[] = {
    {8, 16384, 64, {{{32, 16, 8, 64}, {16, 16, 8, 64}, {16, 16, 8, 64}, {16, 16, 8, 64}}}},
    {8, 16384, 128, {{{32, 16, 8, 64}, {16, 16, 8, 64}, {16, 16, 8, 64}, {16, 16, 4, 64}}}},
    {8, 32768, 64, {{{64, 16, 8, 64}, {32, 16, 8, 64}, {32, 16, 8, 64}, {32, 16, 8, 64}}}},
    {8, 32768, 128, {{{32, 16, 8, 128}, {16, 16, 8, 128}, {16, 16, 8, 128}, {16, 16, 4, 128}}}},
    {8, 49152, 64, {{{64, 32, 8, 64}, {32, 32, 8, 64}, {32, 32, 8, 64}, {32, 32, 8, 64}}}},
    {8, 49152, 128, {{{64, 16, 8, 128}, {32, 16, 8, 128}, {32, 16, 8, 128}, {32, 16, 4, 128}}}},
    {8, 65536, 64, {{{64, 32, 8, 64}, {64, 32, 8, 64}, {64, 32, 8, 64}, {64, 32, 8, 64}}}},
    {8, 65536, 128, {{{64, 32, 8, 128}, {32, 32, 8, 128}, {32, 32, 8, 128}, {32, 32, 4, 128}}}},
    {32, 16384, 64, {{{32, 32, 4, 32}, {32, 16, 4, 32}, {32, 16, 4, 32}, {32, 16, 4, 32}}}},
    {32, 16384, 128, {{{32, 32, 4, 32}, {32, 16, 4, 32}, {32, 16, 4, 32}, {32, 16, 4, 32}}}},
    {32, 32768, 64, {{{64, 32, 4, 32}, {64, 16, 4, 32}, {64, 32, 4, 32}, {64, 16, 4, 32}}}},
    {32, 32768, 128, {{{64, 32, 4, 32}, {64, 16, 4, 32}, {64, 32, 4, 32}, {64, 16, 4, 32}}}},
    {32, 49152, 64, {{{64, 32, 4, 32}, {64, 32, 4, 32}, {64, 32, 4, 32}, {64, 32, 4, 32}}}},
    {64, 65536, 128, {{{64, 32, 4, 32}, {64, 32, 4, 32}, {64, 32, 4, 32}, {64, 32, 4, 32}}}},
};

void CheckFirstShapes() {
  for (const Recorded& recorded : kRecorded) {
    DeviceTraits traits;
    traits.subgroup_size = traits.min_subgroup_size = traits.max_subgroup_size =
        recorded.subgroup_size;
    traits.max_shared_memory = recorded.shared_memory;
    traits.max_workgroup_invocations = 1024;
    for (std::size_t i = 0; i < std::size(kKernels); ++i) {
      const auto [tile_rows, block_rows, thread_rows, slice_columns] = recorded.shapes[i];
      const KernelShapes shapes =
          TunableShapes({kKernels[i], DTYPE_F32, recorded.head_dim, false}, traits);
      const ShapeNumbers expected = {tile_rows, block_rows, thread_rows, slice_columns,
                                     tile_rows / thread_rows * 8};
      EXPECT(NumbersOf(shapes.front()) == expected);
      EXPECT(shapes.size() > 1);
    }
  }
}

void CheckMatrixShapes() {
  DeviceTraits traits;
  traits.subgroup_size = traits.min_subgroup_size = traits.max_subgroup_size = 32;
  traits.max_shared_memory = 49152;
  traits.max_workgroup_invocations = 1024;
  traits.storage_16bit = traits.coopmat_bfloat16 = traits.coopmat_layout_known = true;
  for (const Kernel kernel : {Kernel::kForward, Kernel::kBackwardDq, Kernel::kBackwardDkv}) {
    const KernelShapes narrow = TunableShapes({kernel, DTYPE_BF16, 64, false}, traits);
    EXPECT(narrow.size() == 2);
    EXPECT(narrow[0].block_rows == 64 && narrow[1].block_rows == 32);
    EXPECT(narrow[0].tile_rows == 128 && narrow[1].tile_rows == 128);
    EXPECT(narrow[1].has_careful_pass == (kernel == Kernel::kForward));
    EXPECT(narrow[1].required_subgroup_size == 32);
    EXPECT(TunableShapes({kernel, DTYPE_BF16, 128, false}, traits).size() == 1);
  }
}

// A driver that ends loops: shapes that need more of them are left to shorter walks.
void CheckLoops() {
  const ExampleCall call = {.pass = "forward", .dtype = "float32", .queries = 4096, .keys = 4096};
  DeviceTraits traits;
  traits.max_shared_memory = 32768;
  const TunedKernel kernel = {Kernel::kForward, DTYPE_F32, 64, false};
  const KernelShapes shapes = TunableShapes(kernel, traits);
  Tuning tuning;
  tuning.shapes[kernel] = NumbersOf(shapes[1]);
  traits.tuning = std::make_shared<const Tuning>(tuning);
  const auto ran = [&] { return ExamplePlan(call, traits).dispatches[1].specialization; };
  EXPECT(ran()[9] == shapes[1].slice_columns);
  traits.max_loop_iterations = 65535;  // 8.3 a row: of 7,864 rows, or half of these
  EXPECT(ran()[9] == shapes[0].slice_columns);
  traits.max_loop_iterations = 70000;
  EXPECT(ran()[9] == shapes[1].slice_columns);
}

}  // namespace

void AddRandomTuning(Random& random, const AttentionProblem& problem, DeviceTraits& traits) {
  Tuning tuning;
  const bool planned = (problem.features & FEATURE_PLAN) != 0;
  for (const Kernel kernel : kKernels) {
    const KernelShapes shapes = ShapesOf(kernel, problem, traits).shapes;
    ShapeNumbers numbers = NumbersOf(shapes[random() % shapes.size()]);
    if (Pick(random, {0, 0, 0, 1})) numbers[random() % numbers.size()] = Pick(random, {0, 16, 512});
    tuning.shapes[{kernel, problem.dtype, problem.params.head_dim, planned}] = numbers;
    // Those of other calls must not matter.
    tuning.shapes[{kernel, problem.dtype, problem.params.head_dim, !planned}] = {1, 2, 3, 4, 5};
  }
  traits.tuning = std::make_shared<const Tuning>(tuning);
}

void CheckTuned(const AttentionProblem& problem, const DeviceTraits& traits,
                const DispatchPlan& plan) {
  const bool planned = (problem.features & FEATURE_PLAN) != 0;
  for (const Dispatch& dispatch : plan.dispatches) {
    const auto runs = [&](Kernel kernel) {
      return StartsWith(dispatch.shader, ("attend_" + std::string(KernelName(kernel))).c_str());
    };
    const auto* kernel = std::ranges::find_if(kKernels, runs);
    if (kernel == std::end(kKernels) || StartsWith(dispatch.shader, "attend_backward_dq_stored")) {
      continue;
    }
    CheckShapes(*kernel, problem, traits);
    const KernelShapes shapes = ShapesOf(*kernel, problem, traits).shapes;
    ShapeNumbers expected = NumbersOf(shapes.front());
    if (traits.tuning != nullptr) {
      const ShapeNumbers& named =
          traits.tuning->shapes.at({*kernel, problem.dtype, problem.params.head_dim, planned});
      for (const KernelShape& shape : shapes) {
        if (NumbersOf(shape) == named) expected = named;
      }
    }
    const auto& constants = dispatch.specialization;
    const ShapeNumbers ran = {constants[4], constants[6], constants[8], constants[9], constants[0]};
    EXPECT(ran == expected);
  }
}

void TestShapes() {
  CheckFirstShapes();
  CheckMatrixShapes();
  CheckLoops();
}

}  // namespace jax_aat
