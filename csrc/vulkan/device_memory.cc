#include "vulkan/device_memory.h"

namespace jax_aat {
namespace {

constexpr VkBufferUsageFlags kUsage =
    VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT |
    VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;

constexpr auto kFdHandle = VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT;

constexpr VkMemoryAllocateFlagsInfo kDeviceAddress = {
    .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO,
    .flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT,
};

}  // namespace

DeviceMemory::DeviceMemory(const Device& device, std::uint64_t bytes,
                           VkExternalMemoryHandleTypeFlags handles)
    : device_(&device), bytes_(bytes), memory_(device), buffer_(device) {
  const VkExternalMemoryBufferCreateInfo external = {
      .sType = VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO,
      .handleTypes = handles,
  };
  const VkBufferCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
      .pNext = handles == 0 ? nullptr : &external,
      .size = bytes,
      .usage = kUsage,
      .sharingMode = VK_SHARING_MODE_EXCLUSIVE,
  };
  device.Check(device.vk().CreateBuffer(device.handle(), &info, nullptr, buffer_.out()),
               "vkCreateBuffer");
}

DeviceMemory::DeviceMemory(const Device& device, std::uint32_t memory_type, std::uint64_t bytes)
    : DeviceMemory(device, bytes, VkExternalMemoryHandleTypeFlags{0}) {
  const VkMemoryAllocateInfo info = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
      .pNext = &kDeviceAddress,
      .allocationSize = Requirements().size,
      .memoryTypeIndex = memory_type,
  };
  device.Check(device.vk().AllocateMemory(device.handle(), &info, nullptr, memory_.out()),
               "vkAllocateMemory");
  Bind();
  const VkMemoryPropertyFlags flags =
      device.physical().memory.memoryTypes[memory_type].propertyFlags;
  if (flags & VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT) {
    void* mapped = nullptr;
    device.Check(
        device.vk().MapMemory(device.handle(), memory_.get(), 0, VK_WHOLE_SIZE, 0, &mapped),
        "vkMapMemory");
    mapped_ = static_cast<std::byte*>(mapped);
  }
}

std::optional<DeviceMemory> DeviceMemory::ImportHost(const Device& device, void* pages,
                                                     std::uint64_t bytes) {
  const DeviceTable& vk = device.vk();
  constexpr auto kHandle = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;
  VkMemoryHostPointerPropertiesEXT host = {VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT};
  if (vk.GetMemoryHostPointerPropertiesEXT(device.handle(), kHandle, pages, &host) != VK_SUCCESS) {
    return std::nullopt;
  }
  DeviceMemory memory(device, bytes, VkExternalMemoryHandleTypeFlags{kHandle});
  const VkMemoryRequirements needs = memory.Requirements();
  const auto type = device.physical().MemoryType(VK_MEMORY_PROPERTY_HOST_COHERENT_BIT,
                                                 needs.memoryTypeBits & host.memoryTypeBits);
  if (!type || needs.size > bytes) return std::nullopt;

  const VkImportMemoryHostPointerInfoEXT import = {
      .sType = VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT,
      .pNext = &kDeviceAddress,
      .handleType = kHandle,
      .pHostPointer = pages,
  };
  const VkMemoryAllocateInfo info = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
      .pNext = &import,
      .allocationSize = bytes,
      .memoryTypeIndex = *type,
  };
  if (vk.AllocateMemory(device.handle(), &info, nullptr, memory.memory_.out()) != VK_SUCCESS) {
    return std::nullopt;
  }
  memory.Bind();
  return memory;
}

std::optional<DeviceMemory> DeviceMemory::ImportFd(const Device& device, FileDescriptor fd,
                                                   std::uint64_t bytes) {
  DeviceMemory memory(device, bytes, VkExternalMemoryHandleTypeFlags{kFdHandle});
  if (memory.Requirements().size > bytes) return std::nullopt;
  const VkImportMemoryFdInfoKHR import = {
      .sType = VK_STRUCTURE_TYPE_IMPORT_MEMORY_FD_INFO_KHR,
      .pNext = &kDeviceAddress,
      .handleType = kFdHandle,
      .fd = fd.get(),
  };
  const VkMemoryAllocateInfo info = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
      .pNext = &import,
      .allocationSize = bytes,
      .memoryTypeIndex = memory.DeviceLocalType(),
  };
  if (device.vk().AllocateMemory(device.handle(), &info, nullptr, memory.memory_.out()) !=
      VK_SUCCESS) {
    return std::nullopt;
  }
  fd.Release();
  memory.Bind();
  return memory;
}

DeviceMemory DeviceMemory::Exportable(const Device& device, std::uint64_t bytes) {
  DeviceMemory memory(device, bytes, VkExternalMemoryHandleTypeFlags{kFdHandle});
  const VkExportMemoryAllocateInfo exported = {
      .sType = VK_STRUCTURE_TYPE_EXPORT_MEMORY_ALLOCATE_INFO,
      .pNext = &kDeviceAddress,
      .handleTypes = kFdHandle,
  };
  const VkMemoryAllocateInfo info = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
      .pNext = &exported,
      .allocationSize = memory.Requirements().size,
      .memoryTypeIndex = memory.DeviceLocalType(),
  };
  device.Check(device.vk().AllocateMemory(device.handle(), &info, nullptr, memory.memory_.out()),
               "vkAllocateMemory");
  memory.Bind();
  return memory;
}

FileDescriptor DeviceMemory::ExportFd() const {
  const VkMemoryGetFdInfoKHR info = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_GET_FD_INFO_KHR,
      .memory = memory_.get(),
      .handleType = kFdHandle,
  };
  FileDescriptor fd;
  device_->Check(device_->vk().GetMemoryFdKHR(device_->handle(), &info, fd.out()),
                 "vkGetMemoryFdKHR");
  return fd;
}

std::uint32_t DeviceMemory::DeviceLocalType() const {
  const auto type = device_->physical().MemoryType(VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT,
                                                   Requirements().memoryTypeBits);
  if (type) return *type;
  throw Error(ErrorKind::kUnavailable, "The device has no memory of its own to share.");
}

std::uint32_t DeviceMemory::BufferMemoryTypes(const Device& device) {
  return DeviceMemory(device, 4096, VkExternalMemoryHandleTypeFlags{0})
      .Requirements()
      .memoryTypeBits;
}

VkMemoryRequirements DeviceMemory::Requirements() const {
  VkMemoryRequirements needs;
  device_->vk().GetBufferMemoryRequirements(device_->handle(), buffer_.get(), &needs);
  return needs;
}

void DeviceMemory::Bind() {
  const DeviceTable& vk = device_->vk();
  device_->Check(vk.BindBufferMemory(device_->handle(), buffer_.get(), memory_.get(), 0),
                 "vkBindBufferMemory");
  const VkBufferDeviceAddressInfo info = {
      .sType = VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO,
      .buffer = buffer_.get(),
  };
  address_ = vk.GetBufferDeviceAddress(device_->handle(), &info);
}

}  // namespace jax_aat
