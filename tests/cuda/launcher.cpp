// Reads buffers and launches from stdin, runs them in order under emulation, and writes the buffers to stdout.
//
// Built with -DKERNELS=<file.cu> and -DKERNEL_TABLE=K(name) K(name) ...: the kernels of one source file, launched as the
// driver's API launches them, by name with a list of untyped arguments. Numbers are little endian:
//   u32 buffers, each: u64 bytes, content, u32 pointers, each: u32 offset, u32 buffer, u64 offset there
//   u32 launches, each: u32 length, name, u32 grid[3], u32 threads, u32 shared bytes, u32 is_descending,
//                       u32 arguments, each: u32 kind (0 pointer, 1 u32, 2 f32), u64 value (buffer << 40 | offset)
// A buffer ends where a page without access begins: reading or writing past its end kills the program.

#include "emulation.h"

#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <string>

#include KERNELS

namespace {

constexpr uint64_t NULL_POINTER = ~0ull;
constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 16;

struct Buffer {
    unsigned char* data;
    size_t size;
};

struct Argument {
    uint32_t kind;
    uint64_t value;
};

std::vector<Buffer> buffers;

void read_bytes(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) emulation::fail("the input ends early");
}
template <class T> T read_number() {
    T value;
    read_bytes(&value, sizeof value);
    return value;
}

unsigned char* allocate(size_t size) {
    size_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, pages = (rounded + PAGE - 1) / PAGE + 1;
    void* mapped = mmap(nullptr, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) emulation::fail("no memory");
    unsigned char* end = (unsigned char*)mapped + (pages - 1) * PAGE;
    mprotect(end, PAGE, PROT_NONE);
    return end - rounded;
}

template <class T> T convert(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>) {
        if (argument.kind != 0) emulation::fail("an argument is no pointer");
        if (argument.value == NULL_POINTER) return nullptr;
        return (T)(buffers.at(argument.value >> 40).data + (argument.value & ((1ull << 40) - 1)));
    } else if constexpr (std::is_same_v<T, float>) {
        if (argument.kind != 2) emulation::fail("an argument is no f32");
        return emulation::float_of_bits((uint32_t)argument.value);
    } else {
        static_assert(std::is_same_v<T, uint32_t>, "kernels take pointers, u32 and f32");
        if (argument.kind != 1) emulation::fail("an argument is no u32");
        return (uint32_t)argument.value;
    }
}

using Launch = std::function<void(const std::vector<Argument>&)>;

template <class... A, size_t... I>
void call(void (*function)(A...), const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    function(convert<A>(arguments[I])...);
}

template <class... A> Launch bind(void (*function)(A...)) {
    return [function](const std::vector<Argument>& arguments) {
        if (arguments.size() != sizeof...(A)) emulation::fail("the number of arguments is not the kernel's");
        call(function, arguments, std::index_sequence_for<A...>());
    };
}

#define K(name) {#name, bind(name)},
const std::map<std::string, Launch> kernels = {KERNEL_TABLE};

struct Pointer {
    size_t buffer, offset, target, target_offset;
};

void read_buffers() {
    std::vector<Pointer> pointers;
    uint32_t count = read_number<uint32_t>();
    for (uint32_t i = 0; i < count; i++) {
        size_t size = read_number<uint64_t>();
        buffers.push_back(Buffer{allocate(size), size});
        read_bytes(buffers.back().data, size);
        uint32_t inner = read_number<uint32_t>();
        for (uint32_t p = 0; p < inner; p++) {
            size_t offset = read_number<uint32_t>(), target = read_number<uint32_t>();
            pointers.push_back(Pointer{i, offset, target, read_number<uint64_t>()});
        }
    }
    for (const Pointer& p : pointers) {
        unsigned char* target = buffers.at(p.target).data + p.target_offset;
        memcpy(buffers.at(p.buffer).data + p.offset, &target, sizeof target);
    }
}

void run_launch() {
    std::string name(read_number<uint32_t>(), ' ');
    read_bytes(name.data(), name.size());
    dim3 grid = read_number<dim3>();
    uint32_t threads = read_number<uint32_t>(), shared_bytes = read_number<uint32_t>();
    emulation::is_descending = read_number<uint32_t>() != 0;
    std::vector<Argument> arguments(read_number<uint32_t>());
    for (Argument& argument : arguments) {
        argument.kind = read_number<uint32_t>();
        argument.value = read_number<uint64_t>();
    }
    auto kernel = kernels.find(name);
    if (kernel == kernels.end()) emulation::fail("no such kernel");
    emulation::launch(grid, dim3{threads, 1, 1}, shared_bytes, [&] { kernel->second(arguments); });
}

}  // namespace

int main() {
    read_buffers();
    uint32_t launches = read_number<uint32_t>();
    for (uint32_t i = 0; i < launches; i++) run_launch();
    for (const Buffer& buffer : buffers) {
        if (fwrite(buffer.data, 1, buffer.size, stdout) != buffer.size) emulation::fail("the output ends early");
    }
    return fflush(stdout) == 0 ? 0 : 3;
}
