// The process-wide entry: the instance, the chosen device, a context a device.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "vulkan/context.h"
#include "vulkan/instance.h"

namespace jax_aat {

class Runtime {
 public:
  // Never destroyed; Shutdown frees what matters when the process ends.
  static Runtime& Get();

  // Throws Error (kUnavailable), each time with the same words, where Vulkan is not installed.
  const Instance& instance();

  std::uint32_t default_device();
  void set_default_device(std::uint32_t index);

  // The context of a device, made when first asked for. A lost one is dropped here and lives until
  // its last user leaves; if no caller was told of the loss, this one is.
  std::shared_ptr<Context> Acquire(std::uint32_t device);

  // The context of a device if there is one.
  std::shared_ptr<Context> Existing(std::uint32_t device);

  // Drops all contexts. Does nothing in a forked process, which owns none.
  void Shutdown();

 private:
  Runtime() = default;
  const Instance& InstanceLocked();
  const PhysicalDevice& PhysicalLocked(std::uint32_t index);

  // Whether the process was forked off one that has contexts, which are of no use here: drivers'
  // threads do not survive a fork.
  bool Forked() const;

  std::atomic<pid_t> process_ = 0;  // the one that made the first context; 0: none yet
  std::mutex mutex_;
  std::unique_ptr<Instance> instance_;
  std::optional<Error> instance_failure_;
  std::optional<std::uint32_t> default_device_;
  std::map<std::uint32_t, std::shared_ptr<Context>> contexts_;
};

}  // namespace jax_aat
