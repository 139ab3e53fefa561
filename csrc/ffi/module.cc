// The Python module jax_aat._native: the custom calls, the devices, what ran and what it used.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention/example_plan.h"
#include "ffi/handlers.h"
#include "ffi/tuning_module.h"
#include "metrics/ceilings.h"
#include "metrics/last_dispatch.h"
#include "metrics/profile.h"
#include "vulkan/features.h"
#include "vulkan/local_heap.h"
#include "vulkan/pipeline_cache.h"
#include "vulkan/runtime.h"
#include "vulkan/text.h"
#include "vulkan/validation.h"

namespace nb = nanobind;

namespace jax_aat {
namespace {

using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

nb::dict Registrations(const std::string& platform) {
  const auto targets = [](XLA_FFI_Handler* forward, XLA_FFI_Handler* tangent,
                          XLA_FFI_Handler* backward, XLA_FFI_Handler* plan) {
    nb::dict dict;
    dict["jax_aat_forward"] = nb::capsule(reinterpret_cast<void*>(forward));
    dict["jax_aat_tangent"] = nb::capsule(reinterpret_cast<void*>(tangent));
    dict["jax_aat_backward"] = nb::capsule(reinterpret_cast<void*>(backward));
    dict["jax_aat_plan"] = nb::capsule(reinterpret_cast<void*>(plan));
    return dict;
  };
  if (platform == "cpu") return targets(ForwardOnHost, TangentOnHost, BackwardOnHost, PlanOnHost);
  if (platform == "cuda") return targets(ForwardOnCuda, TangentOnCuda, BackwardOnCuda, PlanOnCuda);
  throw nb::value_error(
      Concat("there are no custom calls for the platform '", platform, "', only cpu and cuda")
          .c_str());
}

nb::dict TraitsDict(const DeviceTraits& traits) {
  nb::dict dict;
  dict["subgroup_size"] = traits.subgroup_size;
  dict["min_subgroup_size"] = traits.min_subgroup_size;
  dict["max_subgroup_size"] = traits.max_subgroup_size;
  dict["max_shared_memory"] = traits.max_shared_memory;
  dict["max_workgroup_invocations"] = traits.max_workgroup_invocations;
  dict["max_workgroup_count"] = traits.max_workgroup_count;
  dict["max_score_gradient_bytes"] = traits.max_score_gradient_bytes;
  dict["storage_16bit"] = traits.storage_16bit;
  dict["coopmat_float16"] = traits.coopmat_float16;
  dict["coopmat_bfloat16"] = traits.coopmat_bfloat16;
  dict["coopmat_layout_known"] = traits.coopmat_layout_known;
  dict["coopmat_relays"] = traits.coopmat_relays;
  return dict;
}

nb::dict DeviceDict(const PhysicalDevice& device) {
  nb::dict features;
  for (const auto& [name, present] : device.features) features[name.c_str()] = present;
  for (const char* extension : KnownExtensions()) {
    features[extension] = device.HasExtension(extension);
  }
  nb::dict dict;
  dict["index"] = device.index;
  dict["name"] = device.name;
  dict["kind"] = DeviceKindName(device.kind);
  dict["vendor_id"] = device.vendor_id;
  dict["uuid"] = device.uuid;
  dict["driver_name"] = device.driver_name;
  dict["driver_info"] = device.driver_info;
  dict["api_version"] = Concat(VK_API_VERSION_MAJOR(device.api_version), ".",
                               VK_API_VERSION_MINOR(device.api_version), ".",
                               VK_API_VERSION_PATCH(device.api_version));
  dict["features"] = features;
  // A context has probed what its device does not tell.
  const auto context = Runtime::Get().Existing(device.index);
  dict["traits"] = TraitsDict(context == nullptr ? device.traits : context->traits());
  dict["missing"] = nb::cast(device.missing);
  return dict;
}

nb::list Devices() {
  nb::list list;
  const Instance* instance = nullptr;
  try {
    const nb::gil_scoped_release release;
    instance = &Runtime::Get().instance();
  } catch (const Error&) {
    return list;  // problem() has the words
  }
  for (const PhysicalDevice& device : instance->devices()) list.append(DeviceDict(device));
  return list;
}

std::string Problem() {
  try {
    Runtime::Get().default_device();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

std::optional<std::uint32_t> DefaultDevice() {
  try {
    return Runtime::Get().default_device();
  } catch (const Error&) {
    return std::nullopt;  // problem() has the words
  }
}

const char* PassName(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return "forward";
    case Pass::kTangent:
      return "tangent";
    case Pass::kBackward:
      return "backward";
    case Pass::kPlan:
      break;
  }
  return "plan";
}

// What the record tells by itself, without its measurements.
nb::dict RecordDict(const DispatchRecord& record) {
  nb::list shaders, flops;
  for (const KernelRecord& kernel : record.kernels) {
    shaders.append(kernel.shader);
    flops.append(kernel.flops);
  }
  nb::dict dict;
  dict["sequence"] = record.sequence;
  dict["pass"] = PassName(record.pass);
  dict["path"] = record.path;
  dict["platform"] = record.platform;
  dict["device"] = record.device;
  dict["device_index"] = record.device_index;
  dict["shaders"] = shaders;
  dict["flops"] = flops;
  dict["imported_bytes"] = record.imported_bytes;
  dict["staged_bytes"] = record.staged_bytes;
  return dict;
}

// FLOPs of a kernel of a call whose work was counted.
double CountedFlops(const KernelRecord& kernel, const Work& work) {
  switch (kernel.key_rows) {
    case KeyRows::kExact:
      return kernel.flops_a_pair * work.exact_pairs;
    case KeyRows::kCoarse:
      return kernel.flops_a_pair * work.coarse_pairs;
    case KeyRows::kAll:
      break;
  }
  return kernel.flops_a_pair * (work.exact_pairs + work.coarse_pairs);
}

nb::dict ProfiledCallDict(const ProfiledCall& call) {
  const DispatchRecord& record = call.record;
  nb::list flops, bytes;
  for (const KernelRecord& kernel : record.kernels) {
    const bool counted = call.work && std::isnan(kernel.flops) && kernel.flops_a_pair > 0;
    flops.append(counted ? CountedFlops(kernel, *call.work) : kernel.flops);
    bytes.append(kernel.bytes);
  }
  nb::dict dict = RecordDict(record);
  dict["flops"] = flops;
  dict["bytes"] = bytes;
  dict["scratch_bytes"] = record.scratch_bytes;
  dict["lent_bytes"] = record.lent_bytes;
  dict["dtype"] = std::string(kDtypeNames[record.dtype]);
  dict["batch"] = record.batch;
  dict["queries"] = record.queries;
  dict["keys"] = record.keys;
  dict["query_heads"] = record.query_heads;
  dict["kv_heads"] = record.kv_heads;
  dict["head_dim"] = record.head_dim;
  dict["causal"] = (record.features & FEATURE_CAUSAL) != 0;
  dict["queue"] = record.queue;
  dict["thread"] = record.thread;
  dict["arrived"] = 1e-9 * static_cast<double>(record.arrived);
  dict["submitted"] = 1e-9 * static_cast<double>(record.submitted);
  dict["ended"] = 1e-9 * static_cast<double>(record.ended);
  dict["stamps"] = nb::cast(call.stamps);
  dict["stream_seconds"] = call.stream_seconds ? nb::cast(*call.stream_seconds) : nb::none();
  dict["exact_pairs"] = call.work ? nb::cast(call.work->exact_pairs) : nb::none();
  dict["coarse_pairs"] = call.work ? nb::cast(call.work->coarse_pairs) : nb::none();
  dict["most_rows"] = call.work ? nb::cast(call.work->most_rows) : nb::none();
  return dict;
}

nb::list StopProfileList() {
  std::vector<ProfiledCall> calls;
  {
    const nb::gil_scoped_release release;
    calls = StopProfile();
  }
  nb::list list;
  for (const ProfiledCall& call : calls) list.append(ProfiledCallDict(call));
  return list;
}

std::optional<nb::dict> LastDispatchDict() {
  std::optional<DispatchRecord> record;
  std::optional<KernelTimes> times;
  {
    const nb::gil_scoped_release release;
    record = LastDispatch();
    if (record && record->timestamps) times = record->timestamps->Times();
  }
  if (!record) return std::nullopt;
  nb::dict dict = RecordDict(*record);
  dict["kernel_milliseconds"] =
      times && !times->milliseconds.empty() ? nb::cast(times->milliseconds) : nb::none();
  dict["elapsed_milliseconds"] = times ? nb::cast(times->elapsed_milliseconds) : nb::none();
  return dict;
}

nb::dict CeilingsDict(std::uint32_t device) {
  Ceilings ceilings;
  {
    const nb::gil_scoped_release release;
    ceilings = MeasureCeilings(*Runtime::Get().Acquire(device));
  }
  nb::dict dict;
  dict["bandwidth"] = ceilings.bandwidth;
  dict["products"] = ceilings.products;
  dict["float16_matrices"] = ceilings.float16_matrices;
  dict["bfloat16_matrices"] = ceilings.bfloat16_matrices;
  return dict;
}

nb::list KernelStatisticsList(std::uint32_t device) {
  std::vector<Pipelines::Statistics> collected;
  {
    const nb::gil_scoped_release release;
    if (const auto context = Runtime::Get().Existing(device)) {
      collected = context->pipelines().CollectStatistics();
    }
  }
  nb::list list;
  for (const Pipelines::Statistics& each : collected) {
    nb::dict values;
    for (const PipelineStatistic& statistic : each.statistics) {
      values[statistic.name.c_str()] = statistic.value;
    }
    list.append(nb::make_tuple(each.shader, nb::cast(each.specialization), values));
  }
  return list;
}

nb::dict ExamplePlanDict(std::uint32_t device, const std::string& pass, const std::string& dtype,
                         std::uint32_t head_dim) {
  DispatchPlan plan;
  {
    const nb::gil_scoped_release release;
    plan = ExamplePlan({.pass = pass, .dtype = dtype, .head_dim = head_dim},
                       Runtime::Get().Acquire(device)->traits());
  }
  nb::list shaders, specializations;
  for (const Dispatch& dispatch : plan.dispatches) {
    shaders.append(dispatch.shader);
    specializations.append(nb::cast(dispatch.specialization));
  }
  nb::dict dict;
  dict["path"] = plan.path;
  dict["shaders"] = shaders;
  dict["specializations"] = specializations;
  return dict;
}

std::uint64_t ScratchBytes(std::uint32_t device, const std::string& pass, const std::string& dtype,
                           const std::array<std::uint32_t, 6>& sizes, bool causal,
                           std::uint32_t query_tile, std::uint32_t super_tile,
                           std::uint32_t level_count, float candidate_share,
                           std::uint32_t judged_key_tiles, std::uint32_t list_capacity,
                           bool corrects) {
  const ExampleCall call = {
      .pass = pass,
      .dtype = dtype,
      .batch = sizes[0],
      .queries = sizes[1],
      .keys = sizes[2],
      .query_heads = sizes[3],
      .kv_heads = sizes[4],
      .head_dim = sizes[5],
      .causal = causal,
      .query_tile = query_tile,
      .super_tile = super_tile,
      .level_count = level_count,
      .candidate_share = candidate_share,
      .judged_key_tiles = judged_key_tiles,
      .list_capacity = list_capacity,
      .corrects = corrects,
  };
  return ExamplePlan(call, Runtime::Get().Acquire(device)->traits()).scratch_bytes;
}

nb::dict PoolDict(const MemoryStatistics::Pool& pool) {
  nb::dict dict;
  dict["reserved_bytes"] = pool.reserved_bytes;
  dict["in_use_bytes"] = pool.in_use_bytes;
  dict["peak_reserved_bytes"] = pool.peak_reserved_bytes;
  dict["peak_in_use_bytes"] = pool.peak_in_use_bytes;
  dict["largest_free_bytes"] = pool.largest_free_bytes;
  dict["blocks"] = pool.blocks;
  dict["allocations"] = pool.allocations;
  dict["total_allocations"] = pool.total_allocations;
  return dict;
}

nb::dict SharedDict(const MemoryStatistics& statistics, Sharing sharing) {
  const MemoryStatistics::Shared& shared = statistics.shared[static_cast<std::size_t>(sharing)];
  nb::dict dict;
  dict["live"] = shared.live;
  dict["live_bytes"] = shared.live_bytes;
  dict["total"] = shared.total;
  return dict;
}

std::optional<nb::dict> MemoryStats(std::uint32_t device) {
  MemoryStatistics statistics;
  LocalHeap heap;
  {
    const nb::gil_scoped_release release;
    const auto context = Runtime::Get().Existing(device);
    if (context == nullptr) return std::nullopt;
    statistics = context->memory().Statistics();
    heap = LargestLocalHeap(context->device());
  }
  nb::dict pools;
  for (std::size_t i = 0; i < kPurposeCount; ++i) {
    pools[PurposeName(static_cast<Purpose>(i))] = PoolDict(statistics.pools[i]);
  }
  nb::dict dict;
  dict["total"] = PoolDict(statistics.total);
  dict["pools"] = pools;
  dict["host_imports"] = SharedDict(statistics, Sharing::kHostImport);
  dict["cuda_imports"] = SharedDict(statistics, Sharing::kCudaImport);
  dict["cuda_exports"] = SharedDict(statistics, Sharing::kCudaExport);
  dict["limit_bytes"] = statistics.limit_bytes;
  dict["heap_bytes"] = heap.bytes;
  dict["heap_budget_bytes"] = heap.budget ? nb::cast(heap.budget->bytes) : nb::none();
  dict["heap_usage_bytes"] = heap.budget ? nb::cast(heap.budget->usage) : nb::none();
  return dict;
}

std::uint64_t TrimMemory(std::uint32_t device) {
  const auto context = Runtime::Get().Existing(device);
  if (context == nullptr) return 0;
  context->queries().Trim();
  return context->memory().Trim();
}

std::string CachePath() {
  Runtime& runtime = Runtime::Get();
  return PipelineCachePath(runtime.instance().devices()[runtime.default_device()]).string();
}

void MarkDeviceLost() {
  Runtime& runtime = Runtime::Get();
  const auto context = runtime.Existing(runtime.default_device());
  if (context != nullptr) context->device().MarkLost();
}

void HideMatrixLayout(bool hide) {
  Runtime& runtime = Runtime::Get();
  const auto context = runtime.Existing(runtime.default_device());
  if (context != nullptr) context->ProbeCoopmatLayout(hide);
}

}  // namespace
}  // namespace jax_aat

NB_MODULE(_native, m) {
  using namespace jax_aat;
  m.doc() = "Vulkan runtime of jax_aat";
  nb::register_exception_translator([](const std::exception_ptr& exception, void*) {
    try {
      std::rethrow_exception(exception);
    } catch (const Error& error) {
      const bool invalid = error.kind() == ErrorKind::kInvalidArgument;
      PyErr_SetString(invalid ? PyExc_ValueError : PyExc_RuntimeError, error.what());
    }
  });
  m.def("registrations", Registrations, nb::arg("platform"));
  m.def("devices", Devices);
  m.def("problem", Problem, ReleaseGil());
  m.def("default_device", DefaultDevice, ReleaseGil());
  m.def(
      "set_default_device", [](std::uint32_t index) { Runtime::Get().set_default_device(index); },
      nb::arg("index"), ReleaseGil());
  m.def("last_dispatch", LastDispatchDict);
  m.def("example_plan", ExamplePlanDict, nb::arg("device"), nb::arg("pass_name"), nb::arg("dtype"),
        nb::arg("head_dim"));
  m.def("scratch_bytes", ScratchBytes, nb::arg("device"), nb::arg("pass_name"), nb::arg("dtype"),
        nb::arg("sizes"), nb::arg("causal") = false, nb::arg("query_tile") = 0,
        nb::arg("super_tile") = 0, nb::arg("level_count") = 0, nb::arg("candidate_share") = 0.0f,
        nb::arg("judged_key_tiles") = 0, nb::arg("list_capacity") = 0, nb::arg("corrects") = false,
        ReleaseGil());
  m.def(
      "set_timing",
      [](bool enabled, bool by_kernel) {
        if (Profiling()) {
          throw std::logic_error(
              "a profile is being taken, which times calls itself: end it first");
        }
        SetTiming(!enabled ? Timing::kOff : by_kernel ? Timing::kByKernel : Timing::kByCall);
      },
      nb::arg("enabled"), nb::arg("by_kernel") = true);
  m.def("start_profile", StartProfile, nb::arg("by_kernel"), ReleaseGil());
  m.def("stop_profile", StopProfileList);
  m.def("measure_ceilings", CeilingsDict, nb::arg("device"));
  m.def("kernel_statistics", KernelStatisticsList, nb::arg("device"));
  m.def("memory_stats", MemoryStats, nb::arg("device"));
  m.def("trim_memory", TrimMemory, nb::arg("device"), ReleaseGil());
  AddTuning(m);
  m.def("validation_messages", ValidationMessages);
  m.def("cache_path", CachePath, ReleaseGil());
  m.def("mark_device_lost", MarkDeviceLost, ReleaseGil());
  m.def("hide_matrix_layout", HideMatrixLayout, nb::arg("hide"), ReleaseGil());
  // Drivers must not be torn down by the exit handlers of the process, in no known order.
  const auto shutdown = nb::cpp_function(
      [] {
        ForgetProfile();
        ForgetLastDispatch();
        Runtime::Get().Shutdown();
      },
      ReleaseGil());
  nb::module_::import_("atexit").attr("register")(shutdown);
}
