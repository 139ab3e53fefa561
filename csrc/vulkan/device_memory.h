// One VkDeviceMemory under one VkBuffer with a device address: fresh memory, or imported host
// pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "vulkan/device_handle.h"

namespace jax_aat {

class DeviceMemory {
 public:
  // Fresh memory of a type, mapped for its whole life where the type is host-visible.
  DeviceMemory(const Device& device, std::uint32_t memory_type, std::uint64_t bytes);
  // Imports host pages; empty where the driver refuses them. `pages` and `bytes` are multiples of
  // the device's host_import_alignment.
  static std::optional<DeviceMemory> ImportHost(const Device& device, void* pages,
                                                std::uint64_t bytes);

  VkBuffer buffer() const { return buffer_.get(); }
  VkDeviceAddress address() const { return address_; }
  std::byte* mapped() const { return mapped_; }
  std::uint64_t bytes() const { return bytes_; }

  // The memory types that a buffer of ours may lie in, one bit each.
  static std::uint32_t BufferMemoryTypes(const Device& device);

 private:
  // An unbound buffer.
  DeviceMemory(const Device& device, std::uint64_t bytes, VkExternalMemoryHandleTypeFlags handles);
  VkMemoryRequirements Requirements() const;
  void Bind();

  const Device* device_;
  std::uint64_t bytes_;
  MemoryHandle memory_;
  BufferHandle buffer_;
  VkDeviceAddress address_ = 0;
  std::byte* mapped_ = nullptr;
};

}  // namespace jax_aat
