// What the GPU does between engines. exchange.ptx is this file, compiled:
//     nvcc -ptx -arch=compute_75 -std=c++17 exchange.cu
// with .version and .target lowered to 7.0 and sm_70. The driver compiles that for the GPU at hand.

struct Copy { const char* source; char* target; unsigned long long bytes; };
struct Exchange {
    Copy copies[96];
    unsigned* signals[64];  // of other ranks, set to 1 when everything is copied
    unsigned* awaited[64];  // of this rank, waited for until they are 1, and set to 0
    unsigned* arrived;      // blocks that have copied; 0 before and after
    int n_copies, n_signals, n_awaited;
};

// A small memset, as a kernel: a CUDA graph passes from kernel to kernel sooner than to a memset node and on.
extern "C" __global__ void fill_words(unsigned* to, unsigned value, unsigned count) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = value;
}

// Copies, tells the other ranks, and waits for what they tell: the last block to have copied does.
extern "C" __global__ void exchange(const __grid_constant__ Exchange e) {
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (int c = 0; c < e.n_copies; c++) {
        const char* source = e.copies[c].source;
        char* target = e.copies[c].target;
        unsigned long long bytes = e.copies[c].bytes;
        unsigned long long words = ((unsigned long long)source | (unsigned long long)target) % 16 ? 0 : bytes / 16;
        for (unsigned long long i = thread; i < words; i += threads)
            ((uint4*)target)[i] = ((const uint4*)source)[i];
        for (unsigned long long i = 16 * words + thread; i < bytes; i += threads) target[i] = source[i];
    }
    if (e.n_signals + e.n_awaited == 0) return;
    __threadfence_system();
    __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) last = atomicAdd(e.arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence_system();
    if (threadIdx.x == 0) *e.arrived = 0;
    if (threadIdx.x < e.n_signals)
        asm volatile("st.release.sys.global.u32 [%0], 1;" ::"l"(e.signals[threadIdx.x]) : "memory");
    if (threadIdx.x < e.n_awaited) {
        unsigned value;
        do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(e.awaited[threadIdx.x]) : "memory");
        while (value != 1);
        *e.awaited[threadIdx.x] = 0;
        __threadfence_system();
    }
}
