/* A sparse network, exported by torch-feather. See docs/native.md of torch-feather.

   All tensors are float32, contiguous, in the order of PyTorch. The batch size is fixed. */
#ifndef @GUARD@
#define @GUARD@

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    @UPPER@_OK = 0,
    @UPPER@_INVALID = 1,   /* a null pointer, or a number out of range */
    @UPPER@_NO_MEMORY = 2,
    @UPPER@_BUSY = 3       /* as many calls of run are in progress as create was told */
};

#define @UPPER@_INPUTS @INPUTS@
#define @UPPER@_OUTPUTS @OUTPUTS@
@SIZES@

typedef struct @NAME@ @NAME@;

typedef struct {
    const char *name;
    int32_t rank;
    const int64_t *shape; /* rank numbers */
    int64_t size;         /* number of float32 values */
} @NAME@_tensor;

/* Description of input or output i, or NULL if there is none. */
const @NAME@_tensor *@NAME@_input(int32_t i);
const @NAME@_tensor *@NAME@_output(int32_t i);

/* Allocate the memory of a network for 1 to 4096 concurrent calls of run. */
int32_t @NAME@_create(@NAME@ **model, int32_t concurrent);

/* Compute the outputs. Allocates nothing. Several threads may call it concurrently. */
int32_t @NAME@_run(@NAME@ *model, const float *const *inputs, float *const *outputs);

/* Free the memory; NULL is allowed. No call of run may be in progress. */
void @NAME@_destroy(@NAME@ *model);

#ifdef __cplusplus
}
#endif

#endif
