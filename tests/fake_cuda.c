/* A libcuda.so.1 for a machine without a GPU: what Triton's launcher calls, computing nothing and remembering launches.
 *
 * With it the whole host side of a launch is real: Triton's specialisation, its compiler, its launcher in C.
 * See fake_cuda.py. Signatures: CUDA driver API reference. */
#include <stdint.h>
#include <string.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
} LaunchConfig;

enum { MAX_PARAMETERS = 128, MAX_THREADS_PER_BLOCK = 0 };

/* Written by the test before a launch: how many parameters the kernel has. */
int parameter_count;

/* Of the last launch. */
unsigned launched_grid[3], launched_block[3], launched_shared;
uint64_t launched_function, launched_parameters[MAX_PARAMETERS];

static uint64_t functions;

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the fake driver";
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = 232448; /* above all the shared memory that a program may have, which Triton compares with its need */
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuCtxGetCurrent(void **context) {
    *context = &functions;
    return 0;
}

int cuCtxSetCurrent(void *context) {
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    return cuCtxGetCurrent(context);
}

int cuCtxSetLimit(int limit, size_t value) {
    return 0;
}

int cuCtxGetLimit(size_t *value, int limit) {
    *value = 0;
    return 0;
}

int cuModuleLoadData(void **module, const void *image) {
    *module = &functions;
    return 0;
}

/* Every function that is loaded gets a number of its own. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)(uintptr_t)++functions;
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    return 0;
}

int cuFuncSetCacheConfig(void *function, int config) {
    return 0;
}

int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
    memcpy(value, &pointer, sizeof pointer);
    return 0;
}

int cuPointerGetAttributes(unsigned count, int *attributes, void **values, uint64_t pointer) {
    return 0;
}

int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
    *count = 1;
    return 0;
}

int cuTensorMapEncodeTiled(void) {
    return 1;
}

int cuTensorMapEncodeIm2col(void) {
    return 1;
}

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    memcpy(launched_grid, config->grid, sizeof launched_grid);
    memcpy(launched_block, config->block, sizeof launched_block);
    launched_shared = config->shared;
    launched_function = (uint64_t)(uintptr_t)function;
    for (int i = 0; i < parameter_count && i < MAX_PARAMETERS; ++i)
        memcpy(&launched_parameters[i], parameters[i], sizeof launched_parameters[i]);
    return 0;
}
