/* libcudart.so.13: what onnxruntime must get an answer from. Offsets are those of CUDA 13.0's structures. */
#include <stdlib.h>
#include <string.h>

typedef int status;

enum { HANDLE_BYTES = 8, ALIGNMENT = 512 };

static void put(void *structure, size_t offset, int value) { memcpy((char *)structure + offset, &value, sizeof value); }
static void put_size(void *structure, size_t offset, size_t value) { memcpy((char *)structure + offset, &value, sizeof value); }
static status handle(void **made) { *made = malloc(HANDLE_BYTES); return 0; }

status cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
status cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorName(status error) { return "stub"; }
const char *cudaGetErrorString(status error) { return "stub"; }
status cudaGetDeviceCount(int *count) { *count = 1; return 0; }
status cudaGetDevice(int *device) { *device = 0; return 0; }

/* A GPU of compute capability 9.0 (cudaDeviceProp, 1008 bytes). */
status cudaGetDeviceProperties(void *properties, int device) {
    memset(properties, 0, 1008);
    strcpy(properties, "stub");
    put_size(properties, 288, 80ul << 30);   /* totalGlobalMem */
    put_size(properties, 296, 49152);        /* sharedMemPerBlock */
    put(properties, 304, 65536);             /* regsPerBlock */
    put(properties, 308, 32);                /* warpSize */
    put(properties, 320, 1024);              /* maxThreadsPerBlock */
    put(properties, 324, 1024);              /* maxThreadsDim[3] */
    put(properties, 328, 1024);
    put(properties, 332, 64);
    put(properties, 336, 2147483647);        /* maxGridSize[3] */
    put(properties, 340, 65535);
    put(properties, 344, 65535);
    put(properties, 360, 9);                 /* major */
    put(properties, 364, 0);                 /* minor */
    put(properties, 384, 132);               /* multiProcessorCount */
    put(properties, 596, 50 << 20);          /* l2CacheSize */
    put(properties, 604, 2048);              /* maxThreadsPerMultiProcessor */
    put_size(properties, 624, 233472);       /* sharedMemPerMultiprocessor */
    put_size(properties, 672, 232448);       /* sharedMemPerBlockOptin */
    return 0;
}

status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;        /* threads of a block */
        case 8: *value = 49152; break;       /* shared memory of a block */
        case 10: *value = 32; break;         /* threads of a warp */
        case 16: *value = 132; break;        /* multiprocessors */
        case 75: *value = 9; break;          /* compute capability */
        case 76: *value = 0; break;
        case 97: *value = 232448; break;     /* shared memory of a block that asks for more */
        default: *value = 1;
    }
    return 0;
}

status cudaMalloc(void **made, size_t size) {
    *made = aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT);
    return *made ? 0 : 2;
}
status cudaMallocHost(void **made, size_t size) { return cudaMalloc(made, size); }
status cudaHostAlloc(void **made, size_t size, unsigned flags) { return cudaMalloc(made, size); }
status cudaMallocFromPoolAsync(void **made, size_t size, void *pool, void *stream) { return cudaMalloc(made, size); }
status cudaFree(void *memory) { free(memory); return 0; }
status cudaFreeHost(void *memory) { free(memory); return 0; }
status cudaFreeAsync(void *memory, void *stream) { free(memory); return 0; }
status cudaMemGetInfo(size_t *available, size_t *total) { *available = 79ul << 30; *total = 80ul << 30; return 0; }
status cudaMemcpy(void *to, const void *from, size_t size, int kind) { memmove(to, from, size); return 0; }
status cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { memmove(to, from, size); return 0; }
status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) { memset(to, 0, size); return 0; }
status cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
status cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return 0; }

status cudaStreamCreate(void **made) { return handle(made); }
status cudaStreamCreateWithFlags(void **made, unsigned flags) { return handle(made); }
status cudaEventCreate(void **made) { return handle(made); }
status cudaEventCreateWithFlags(void **made, unsigned flags) { return handle(made); }
status cudaEventElapsedTime(float *ms, void *from, void *to) { *ms = 1; return 0; }
status cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
status cudaStreamEndCapture(void *stream, void **graph) { return handle(graph); }
status cudaGraphInstantiate(void **made, void *graph, unsigned long long flags) { return handle(made); }
status cudaMemPoolCreate(void **made, void *properties) { return handle(made); }
status cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { memset(value, 0, 8); return 0; }

/* cudaPointerAttributes, cudaFuncAttributes */
status cudaPointerGetAttributes(void *attributes, const void *memory) { memset(attributes, 0, 88); put(attributes, 0, 2); return 0; }
status cudaFuncGetAttributes(void *attributes, const void *function) {
    memset(attributes, 0, 144);
    put(attributes, 24, 1024);
    put(attributes, 28, 32);
    return 0;
}
status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned flags) {
    *blocks = 1;
    return 0;
}

void **__cudaRegisterFatBinary(void *code) { static void *registered; return &registered; }
unsigned __cudaPushCallConfiguration(void) { return 1; }
status cudaGetDriverEntryPointByVersion(void) { return 1; }
status cudaLibraryLoadData(void **made) { return handle(made); }
status cudaLibraryGetKernel(void **made) { return handle(made); }
status __cudaGetKernel(void **made) { return handle(made); }
