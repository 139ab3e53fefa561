#include "vulkan/tuning_file.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <system_error>

#include "vulkan/cache_files.h"
#include "vulkan/logging.h"
#include "vulkan/status.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

// A line of the key, a line a kernel, then the checksum of all that comes before:
//   jax_aat tuning 1 of KEY
//   forward float32 64 exact 64 32 4 32 128
//   checksum 0123456789abcdef
constexpr std::string_view kChecksum = "checksum ";

std::string FirstLine(const PhysicalDevice& device) {
  return Concat("jax_aat tuning 1 of ", CacheKey(device), "\n");
}

std::string LineOf(const TunedKernel& tuned, const ShapeNumbers& numbers) {
  std::ostringstream line;
  line << KernelName(tuned.kernel) << ' ' << kDtypeNames[tuned.dtype] << ' ' << tuned.head_dim
       << ' ' << (tuned.planned ? "planned" : "exact");
  for (const std::uint32_t number : numbers) line << ' ' << number;
  return line.str();
}

std::string LastLine(std::string_view lines) {
  std::ostringstream line;
  line << kChecksum << std::hex << Checksum(lines) << '\n';
  return line.str();
}

// Adds what a line says; whether it says anything.
bool AddLine(const std::string& line, Tuning& tuning) {
  std::istringstream words(line);
  std::string kernel, dtype, calls;
  std::uint32_t head_dim = 0;
  ShapeNumbers numbers;
  words >> kernel >> dtype >> head_dim >> calls;
  for (std::uint32_t& number : numbers) words >> number;
  const auto tuned = FindTunedKernel(kernel, dtype, head_dim, calls == "planned");
  if (!words || !tuned || LineOf(*tuned, numbers) != line) return false;
  tuning.shapes[*tuned] = numbers;
  return true;
}

// Nothing where the text is none that WriteTuning wrote.
std::optional<Tuning> Parse(const std::string& text, const std::string& first_line) {
  const std::size_t end = text.rfind(kChecksum);
  if (!text.starts_with(first_line) || end == std::string::npos ||
      text.substr(end) != LastLine(std::string_view(text).substr(0, end))) {
    return std::nullopt;
  }
  std::istringstream lines(text.substr(first_line.size(), end - first_line.size()));
  Tuning tuning;
  for (std::string line; std::getline(lines, line);) {
    if (!AddLine(line, tuning)) return std::nullopt;
  }
  return tuning;
}

}  // namespace

std::filesystem::path TuningPath(const PhysicalDevice& device) {
  return CacheFile(device, ".tuning");
}

Tuning ReadTuning(const PhysicalDevice& device, const DeviceTraits& traits) {
  const std::filesystem::path path = TuningPath(device);
  std::ifstream file(path, std::ios::binary);
  if (!file) return {};
  const std::string text(std::istreambuf_iterator<char>(file), {});
  std::optional<Tuning> tuning = Parse(text, FirstLine(device));
  const auto warn = [&](const std::string& what) {
    Log(LogLevel::kWarning, Concat("the tuning ", path.string(), " ", what,
                                   ", ignored: python -m jax_aat tune makes it anew"));
  };
  if (!tuning) {
    warn("is damaged or of another device, driver or build");
    return {};
  }
  std::erase_if(tuning->shapes, [&](const auto& entry) {
    if (CanRun(entry.first, entry.second, traits)) return false;
    warn(Concat("has a shape that does not fit (", LineOf(entry.first, entry.second), ")"));
    return true;
  });
  return *std::move(tuning);
}

void WriteTuning(const PhysicalDevice& device, const Tuning& tuning) {
  const std::filesystem::path path = TuningPath(device);
  if (path.empty() && tuning.shapes.empty()) return;
  if (path.empty()) {
    throw Error(ErrorKind::kUnavailable,
                "There is no folder to keep a tuning in: set JAX_AAT_CACHE_DIR to one.");
  }
  bool done = false;
  if (tuning.shapes.empty()) {
    std::error_code failure;
    std::filesystem::remove(path, failure);
    done = !failure;
  } else {
    std::string text = FirstLine(device);
    for (const auto& [tuned, numbers] : tuning.shapes) text += LineOf(tuned, numbers) + "\n";
    done = ReplaceFile(path, {text, LastLine(text)});
  }
  if (!done) {
    throw Error(ErrorKind::kUnavailable,
                Concat("The tuning ", path.string(),
                       " could not be written: make its folder writable, or set "
                       "JAX_AAT_CACHE_DIR to another."));
  }
}

}  // namespace jax_aat
