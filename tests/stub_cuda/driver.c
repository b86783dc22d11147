/* libcuda.so.1: a driver that the environment describes. */
#include <stdlib.h>
#include <string.h>

static int told(const char *name, int otherwise) { const char *value = getenv(name); return value ? atoi(value) : otherwise; }

int cuDriverGetVersion(int *version) { *version = told("STUB_DRIVER_CUDA", 13000); return 0; }
int cuInit(unsigned flags) { return told("STUB_INIT_STATUS", 0); }
int cuGetErrorName(int status, const char **name) { *name = status == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : 0; return *name ? 0 : 1; }
int cuDeviceGetCount(int *count) { *count = told("STUB_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "stub", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 80ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
