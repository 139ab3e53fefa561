// One VkDeviceMemory under one VkBuffer with a device address: fresh memory, imported host pages,
// or memory that is shared with another API through a file descriptor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "vulkan/device_handle.h"
#include "vulkan/file_descriptor.h"

namespace jax_aat {

class DeviceMemory {
 public:
  // Fresh memory of a type, mapped for its whole life where the type is host-visible.
  DeviceMemory(const Device& device, std::uint32_t memory_type, std::uint64_t bytes);
  // Imports host pages; empty where the driver refuses them. `pages` and `bytes` are multiples of
  // the device's host_import_alignment.
  static std::optional<DeviceMemory> ImportHost(const Device& device, void* pages,
                                                std::uint64_t bytes);
  // Imports device-local memory that another API exported; empty where the driver refuses it.
  static std::optional<DeviceMemory> ImportFd(const Device& device, FileDescriptor fd,
                                              std::uint64_t bytes);
  // Fresh device-local memory that ExportFd shares.
  static DeviceMemory Exportable(const Device& device, std::uint64_t bytes);
  // A new file descriptor of Exportable memory.
  FileDescriptor ExportFd() const;

  VkBuffer buffer() const { return buffer_.get(); }
  VkDeviceAddress address() const { return address_; }
  std::byte* mapped() const { return mapped_; }
  std::uint64_t bytes() const { return bytes_; }
  // As the driver rounded it up.
  std::uint64_t allocated_bytes() const { return Requirements().size; }

  // The memory types that a buffer of ours may lie in, one bit each.
  static std::uint32_t BufferMemoryTypes(const Device& device);

 private:
  // An unbound buffer.
  DeviceMemory(const Device& device, std::uint64_t bytes, VkExternalMemoryHandleTypeFlags handles);
  VkMemoryRequirements Requirements() const;
  std::uint32_t DeviceLocalType() const;
  void Bind();

  const Device* device_;
  std::uint64_t bytes_;
  MemoryHandle memory_;
  BufferHandle buffer_;
  VkDeviceAddress address_ = 0;
  std::byte* mapped_ = nullptr;
};

}  // namespace jax_aat
