// The PTX vocabulary the kernels are written in: mbarriers, TMA, wgmma. One instruction a
// function.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flashmla::sm90::ptx {

__device__ __forceinline__ uint32_t SmemAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same object in shared memory, its address in a register: or it would be found out again and
// again, where registers are scarce, by asking for this block's place in its cluster.
template <typename T>
__device__ __forceinline__ T& KeepAddress(T& object) {
  const uint32_t address = __shfl_sync(~0u, SmemAddress(&object), 0);
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// This thread's place in its warp, and in its block, found out where it is needed: neither it nor
// what follows from it is kept in registers for long.
__device__ __forceinline__ int LaneId() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ __forceinline__ int ThreadId() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int GridY() {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.y;" : "=r"(blocks));
  return blocks;
}

// The same, but the compiler does not know: what follows from it is found out after this, and not
// kept in registers from before.
__device__ __forceinline__ uint32_t Opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// True in one lane of the warp, always the same one; and the compiler knows that it is one.
__device__ __forceinline__ bool ElectOne() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, -1;\nselp.u32 %0, 1, 0, one;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

// The same, which all lanes of a warp have alike, but the compiler does not know: what follows from
// it is computed in uniform registers. wgmma takes its descriptors from there.
__device__ __forceinline__ uint32_t Uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// --- mbarrier -------------------------------------------------------------------------------

__device__ __forceinline__ void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SmemAddress(barrier)), "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SmemAddress(barrier)) : "memory");
}

__device__ __forceinline__ void MbarrierArriveExpectTx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SmemAddress(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives on the barrier at the same place in block `rank` of this thread's cluster.
__device__ __forceinline__ void MbarrierArriveAt(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(SmemAddress(barrier)),
      "r"(rank)
      : "memory");
}

// The same in threads of which the condition holds, without a branch.
__device__ __forceinline__ void MbarrierArriveAtIf(bool condition, uint64_t* barrier,
                                                   uint32_t rank) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 remote;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(SmemAddress(barrier)),
      "r"(rank), "r"(static_cast<int>(condition))
      : "memory");
}

// Returns once the phase of this parity has completed. What was written before is visible to this
// thread: by other threads of the block and, into its shared memory, by other blocks of the cluster
// (for which the letter of the model wants .cluster as a scope; that would throw away the L1
// cache).
__device__ __forceinline__ void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_%=;\n}\n" ::"r"(SmemAddress(barrier)),
      "r"(parity)
      : "memory");
}

// --- Barriers and fences --------------------------------------------------------------------

// Synchronises `threads` threads, all of which name the same barrier (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void NamedBarrierSync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// This block's place in its cluster.
__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster, which arrive, and wait for each other.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive;" ::: "memory");
}
// Where FenceMbarrierInit has made visible what others have to see.
__device__ __forceinline__ void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}
__device__ __forceinline__ void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}

// Writes to the same place in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void StoreCluster(float* address, uint32_t rank, float value) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n}\n" ::"r"(SmemAddress(address)),
      "r"(rank), "f"(value)
      : "memory");
}
__device__ __forceinline__ void StoreCluster(int* address, uint32_t rank, int value) {
  StoreCluster(reinterpret_cast<float*>(address), rank, __int_as_float(value));
}

// Reads from there.
__device__ __forceinline__ int LoadCluster(const int* address, uint32_t rank) {
  int value;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.b32 %0, [remote];\n}\n"
      : "=r"(value)
      : "r"(SmemAddress(address)), "r"(rank)
      : "memory");
  return value;
}

// The same without waiting: the number, or four of them, come when they come, and are counted on a
// barrier of that block.
__device__ __forceinline__ void StoreClusterAsync4(float* address, uint32_t rank, float value,
                                                   uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b32 remote, there;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mapa.shared::cluster.u32 there, %3, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote], %2, [there];\n}\n" ::"r"(
          SmemAddress(address)),
      "r"(rank), "r"(__float_as_uint(value)), "r"(SmemAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void StoreClusterAsync16(float4* address, uint32_t rank,
                                                    const float* values, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b32 remote, there;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mapa.shared::cluster.u32 there, %6, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%2, %3, %4, %5}, "
      "[there];\n}\n" ::"r"(SmemAddress(address)),
      "r"(rank), "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])),
      "r"(__float_as_uint(values[2])), "r"(__float_as_uint(values[3])), "r"(SmemAddress(barrier))
      : "memory");
}

// Under `condition`, without a branch: the copy engine takes bytes to `target` in block `rank` of
// the cluster, and counts them on a barrier there.
__device__ __forceinline__ void BulkCopyToClusterIf(bool condition, uint32_t target,
                                                    uint32_t source, uint32_t bytes,
                                                    uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 remote, there;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 there, %3, %4;\n"
      "@p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [remote], [%1], "
      "%2, [there];\n}\n" ::"r"(target),
      "r"(source), "r"(bytes), "r"(SmemAddress(barrier)), "r"(rank),
      "r"(static_cast<int>(condition))
      : "memory");
}

// Orders ordinary shared-memory accesses of this thread before those of wgmma and TMA.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Programmatic dependent launch. A kernel so launched may start while the one before it in the
// stream still runs; it waits here until all of that is complete and visible. And it may let the
// next one start, which happens once all its blocks have said so or ended.
__device__ __forceinline__ void WaitForPreviousKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Registers of this warpgroup's threads from here on; all four warps call it.
template <int Registers>
__device__ __forceinline__ void IncreaseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void DecreaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// 2^x to within two units in the last place; subnormal results become zero.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of sums of weights, which are 0, infinite, NaN, or numbers whose reciprocals are normal: there
// they are good to 2^-22, in a quarter of the instructions of others.
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The numbers that two e4m3 codes stand for.
__device__ __forceinline__ float2 FromE4m3(uint32_t codes) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// The nearest codes of two numbers of magnitudes up to 448; 0x7f for NaN.
__device__ __forceinline__ uint32_t ToE4m3(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// Four codes in half precision, which holds all of them.
__device__ __forceinline__ void FromE4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, l;\n"
      "cvt.rn.f16x2.e4m3x2 %1, h;\n}\n"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}

// From -126 to 127.
__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __uint_as_float((127 + exponent) << 23);
}

// Products of two pairs of numbers.
__device__ __forceinline__ uint32_t Multiply(__half, uint32_t a, uint32_t b) {
  uint32_t c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint32_t Multiply(__nv_bfloat16, uint32_t a, uint32_t b) {
  uint32_t c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// --- Copies ---------------------------------------------------------------------------------

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 16 bytes of what nobody writes meanwhile. Volatile: where it stands in the code, the load begins.
__device__ __forceinline__ uint4 Load16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint2 Load8(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

__device__ __forceinline__ uint32_t Load4(const void* address) {
  uint32_t v;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

// Or else -1. Without a branch, after which the number would be waited for.
__device__ __forceinline__ int LoadIf(bool condition, const int32_t* address) {
  int v;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "mov.b32 %0, -1;\n"
      "@p ld.global.nc.b32 %0, [%2];\n}\n"
      : "=r"(v)
      : "r"(static_cast<int>(condition)), "l"(address));
  return v;
}

// 16 bytes to shared memory.
__device__ __forceinline__ void StoreShared16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 4 bytes.
__device__ __forceinline__ void StoreShared4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Adds 1 to a number there, without a branch.
__device__ __forceinline__ void CountIf(bool condition, uint32_t address) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p red.shared.add.u32 [%0], 1;\n}\n" ::"r"(address),
      "r"(static_cast<int>(condition))
      : "memory");
}

// 16 bytes from shared memory.
__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// A line of 128 bytes to the L2 cache.
__device__ __forceinline__ void PrefetchL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// Contiguous bytes to the L2 cache; address and number are multiples of 16.
__device__ __forceinline__ void BulkPrefetchL2(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// Contiguous bytes to shared memory; the barrier counts them as they arrive. Addresses and number
// are multiples of 16.
__device__ __forceinline__ void BulkCopy(uint32_t destination, const void* source, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(SmemAddress(barrier))
      : "memory");
}

// The line of 128 bytes at `address` becomes undefined, and is not written back to memory.
__device__ __forceinline__ void DiscardL2(const void* address) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(address) : "memory");
}

// A box of a tensor to shared memory; the barrier counts its bytes as they arrive. What lies
// outside the tensor reads as the map's fill value.
__device__ __forceinline__ void TmaLoad5D(void* destination, const CUtensorMap* map,
                                          uint64_t* barrier, int c0, int c1, int c2, int c3,
                                          int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(SmemAddress(destination)),
      "l"(map), "r"(SmemAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// What is read once the L2 cache gives up first; other things when their turn comes.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;
inline constexpr uint64_t kEvictNormal = 0x1000000000000000;

// The same, of what is read once unless `policy` says otherwise.
__device__ __forceinline__ void TmaLoad4D(void* destination, const CUtensorMap* map,
                                          uint64_t* barrier, int c0, int c1, int c2, int c3,
                                          uint64_t policy = kEvictFirst) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(SmemAddress(destination)),
      "l"(map), "r"(SmemAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}
// The same, to that place in each block of the cluster whose bit is set in `blocks`; the barriers
// at the place of `barrier` count the bytes.
__device__ __forceinline__ void TmaLoad4DMulticast(void* destination, const CUtensorMap* map,
                                                   uint64_t* barrier, int c0, int c1, int c2,
                                                   int c3, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(
          SmemAddress(destination)),
      "l"(map), "r"(SmemAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks),
      "l"(kEvictFirst)
      : "memory");
}

// 16 bytes to shared memory, without passing through registers; behind so many, zeros.
__device__ __forceinline__ void CpAsyncUpTo16(uint32_t destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CpAsync16(uint32_t destination, const void* source, bool valid) {
  CpAsyncUpTo16(destination, source, valid ? 16 : 0);
}

// 8 bytes.
__device__ __forceinline__ void CpAsync8(uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(destination), "l"(source)
               : "memory");
}

// Arrives on the barrier when what this thread has copied so until now has come.
__device__ __forceinline__ void CpAsyncArrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SmemAddress(barrier))
               : "memory");
}

__device__ __forceinline__ void CpAsyncWaitAll() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements from a warp's fragments to shared memory.
__device__ __forceinline__ void StMatrix4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                          uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void StMatrix4Transposed(uint32_t address, uint32_t a, uint32_t b,
                                                    uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// An 8x8 matrix of 16-bit elements in a warp's registers, transposed.
__device__ __forceinline__ uint32_t Transpose(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// --- wgmma ----------------------------------------------------------------------------------

// A shared-memory operand is made of 64-element (128-byte) wide, 128-byte swizzled panels whose
// rows are 128 bytes apart; eight rows are a 1024-byte pattern. Its descriptor is 64 bits of which
// only the address changes from instruction to instruction: keeping it apart leaves one uniform add
// each.
//
// KMajor: the contraction runs along the 128 bytes; a step of 16 along it is 32 bytes.
// MnMajor: the contraction runs across the rows; a step of 16 along it is 2048 bytes, and the next
// 64 elements of the other dimension are `PanelBytes` away.
struct KMajor {
  static constexpr uint64_t kBits =
      (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16);
};
// With rows of 32 elements (64 bytes), 64-byte swizzled; eight rows are 512 bytes.
struct KMajor64 {
  static constexpr uint64_t kBits =
      (uint64_t{2} << 62) | (uint64_t{512 >> 4} << 32) | (uint64_t{1} << 16);
};
template <uint32_t PanelBytes>
struct MnMajor {
  static constexpr uint64_t kBits =
      (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{PanelBytes >> 4} << 16);
};

// `address` is uniform over the warpgroup and a multiple of 16. Within a block it is below 256 KB;
// in a cluster the block's rank stands above that.
template <typename Layout>
__device__ __forceinline__ uint64_t Descriptor(uint32_t address) {
  const uint32_t low = static_cast<uint32_t>(Layout::kBits) | (address >> 4 & 0x3FFF);
  const uint32_t high = static_cast<uint32_t>(Layout::kBits >> 32);
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
  return descriptor;
}

// The same operand `bytes` further on.
__device__ __forceinline__ uint64_t Advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Orders register accesses before the wgmmas that follow.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `Pending` of the newest groups are unfinished.
template <int Pending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The accumulator's registers, as constraints and in the text; `a`, `b` and the flag follow them.
#define FLASHMLA_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHMLA_D16(d, i) \
  FLASHMLA_D4(d, i), FLASHMLA_D4(d, i + 4), FLASHMLA_D4(d, i + 8), FLASHMLA_D4(d, i + 12)
#define FLASHMLA_D32(d, i) FLASHMLA_D16(d, i), FLASHMLA_D16(d, i + 16)
#define FLASHMLA_D128(d) \
  FLASHMLA_D32(d, 0), FLASHMLA_D32(d, 32), FLASHMLA_D32(d, 64), FLASHMLA_D32(d, 96)
#define FLASHMLA_D32_TEXT                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, "         \
  " %8, %9, %10, %11, %12, %13, %14, %15, "   \
  " %16, %17, %18, %19, %20, %21, %22, %23, " \
  " %24, %25, %26, %27, %28, %29, %30, %31}, "
#define FLASHMLA_D128_TEXT                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, "                 \
  " %8, %9, %10, %11, %12, %13, %14, %15, "           \
  " %16, %17, %18, %19, %20, %21, %22, %23, "         \
  " %24, %25, %26, %27, %28, %29, %30, %31, "         \
  " %32, %33, %34, %35, %36, %37, %38, %39, "         \
  " %40, %41, %42, %43, %44, %45, %46, %47, "         \
  " %48, %49, %50, %51, %52, %53, %54, %55, "         \
  " %56, %57, %58, %59, %60, %61, %62, %63, "         \
  " %64, %65, %66, %67, %68, %69, %70, %71, "         \
  " %72, %73, %74, %75, %76, %77, %78, %79, "         \
  " %80, %81, %82, %83, %84, %85, %86, %87, "         \
  " %88, %89, %90, %91, %92, %93, %94, %95, "         \
  " %96, %97, %98, %99, %100, %101, %102, %103, "     \
  " %104, %105, %106, %107, %108, %109, %110, %111, " \
  " %112, %113, %114, %115, %116, %117, %118, %119, " \
  " %120, %121, %122, %123, %124, %125, %126, %127}, "

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T, both K-major in shared memory.
template <typename T>
__device__ __forceinline__ void WgmmaM64N64(float (&d)[32], uint64_t a, uint64_t b,
                                            int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                                                   \
  asm volatile(                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE " " FLASHMLA_D32_TEXT \
      "%32, %33, p, 1, 1, 0, 0;\n}\n"                                          \
      : FLASHMLA_D32(d, 0)                                                     \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// d = a b^T, whatever it was: where other numbers were in its place while another wgmma was under
// way.
#define FLASHMLA_NEW4(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define FLASHMLA_NEW16(d, i) \
  FLASHMLA_NEW4(d, i), FLASHMLA_NEW4(d, i + 4), FLASHMLA_NEW4(d, i + 8), FLASHMLA_NEW4(d, i + 12)
template <typename T>
__device__ __forceinline__ void WgmmaM64N64New(float (&d)[32], uint64_t a, uint64_t b) {
#define FLASHMLA_WGMMA(TYPE)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE " " FLASHMLA_D32_TEXT \
               "%32, %33, 0, 1, 1, 0, 0;\n"                                             \
               : FLASHMLA_NEW16(d, 0), FLASHMLA_NEW16(d, 16)                            \
               : "l"(a), "l"(b))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// The same with `a` in registers: a row-major fragment, laid out as accumulators are.
template <typename T>
__device__ __forceinline__ void WgmmaM64N64(float (&d)[32], const uint32_t* a, uint64_t b,
                                            int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                                                   \
  asm volatile(                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE " " FLASHMLA_D32_TEXT \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                            \
      : FLASHMLA_D32(d, 0)                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// d[64 x 256] += a[64 x 16] b[16 x 256], a K-major and b MN-major in shared memory.
template <typename T>
__device__ __forceinline__ void WgmmaM64N256(float (&d)[128], uint64_t a, uint64_t b) {
#define FLASHMLA_WGMMA(TYPE)                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE " " FLASHMLA_D128_TEXT \
               "%128, %129, 1, 1, 1, 0, 1;\n"                                             \
               : FLASHMLA_D128(d)                                                         \
               : "l"(a), "l"(b))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// The same with `a` in registers.
template <typename T>
__device__ __forceinline__ void WgmmaM64N256(float (&d)[128], const uint32_t* a, uint64_t b) {
#define FLASHMLA_WGMMA(TYPE)                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE " " FLASHMLA_D128_TEXT \
               "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"                            \
               : FLASHMLA_D128(d)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// d[64 x 128] += a[64 x 16] b[16 x 128] in bfloat16, as WgmmaM64N256: where threads start with too
// few registers for that.
#define FLASHMLA_D64(d) FLASHMLA_D32(d, 0), FLASHMLA_D32(d, 32)
#define FLASHMLA_D64_TEXT                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, "         \
  " %8, %9, %10, %11, %12, %13, %14, %15, "   \
  " %16, %17, %18, %19, %20, %21, %22, %23, " \
  " %24, %25, %26, %27, %28, %29, %30, %31, " \
  " %32, %33, %34, %35, %36, %37, %38, %39, " \
  " %40, %41, %42, %43, %44, %45, %46, %47, " \
  " %48, %49, %50, %51, %52, %53, %54, %55, " \
  " %56, %57, %58, %59, %60, %61, %62, %63}, "
__device__ __forceinline__ void WgmmaM64N128(float* d, uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " FLASHMLA_D64_TEXT
               "%64, %65, 1, 1, 1, 0, 1;\n"
               : FLASHMLA_D64(d)
               : "l"(a), "l"(b));
}

// d[64 x N] (+)= a[64 x 16] b[N x 16]^T for N = 16, 32, 64 and 128, b K-major in shared memory, a
// K-major or, with kTransposeA and N up to 32, MN-major.
template <typename T, int kTransposeA>
__device__ __forceinline__ void WgmmaM64(float (&d)[8], uint64_t a, uint64_t b, int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                             \
  asm volatile(                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"       \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, "              \
      "%8, %9, p, 1, 1, %11, 0;\n}\n"                    \
      : FLASHMLA_D4(d, 0), FLASHMLA_D4(d, 4)             \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}
template <typename T, int kTransposeA>
__device__ __forceinline__ void WgmmaM64(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                                                      \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE                          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
      "%16, %17, p, 1, 1, %19, 0;\n}\n"                                           \
      : FLASHMLA_D16(d, 0)                                                        \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

template <typename T, int kTransposeA>
__device__ __forceinline__ void WgmmaM64(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kTransposeA == 0);
  WgmmaM64N64<T>(d, a, b, accumulate);
}
template <typename T, int kTransposeA>
__device__ __forceinline__ void WgmmaM64(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kTransposeA == 0);
#define FLASHMLA_WGMMA(TYPE)                                                    \
  asm volatile(                                                                 \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE " " FLASHMLA_D64_TEXT \
      "%64, %65, p, 1, 1, 0, 0;\n}\n"                                           \
      : FLASHMLA_D64(d)                                                         \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

// The same with `a` in registers.
template <typename T>
__device__ __forceinline__ void WgmmaM64(float (&d)[8], const uint32_t* a, uint64_t b,
                                         int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                             \
  asm volatile(                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"       \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, "              \
      "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"        \
      : FLASHMLA_D4(d, 0), FLASHMLA_D4(d, 4)             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}
template <typename T>
__device__ __forceinline__ void WgmmaM64(float (&d)[16], const uint32_t* a, uint64_t b,
                                         int accumulate) {
#define FLASHMLA_WGMMA(TYPE)                                                      \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE                          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"                               \
      : FLASHMLA_D16(d, 0)                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FLASHMLA_WGMMA("f16.f16");
  } else {
    FLASHMLA_WGMMA("bf16.bf16");
  }
#undef FLASHMLA_WGMMA
}

#undef FLASHMLA_D4
#undef FLASHMLA_D16
#undef FLASHMLA_D32
#undef FLASHMLA_D128
#undef FLASHMLA_D32_TEXT
#undef FLASHMLA_D128_TEXT

}  // namespace flashmla::sm90::ptx
