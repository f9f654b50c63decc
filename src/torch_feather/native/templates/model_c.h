/* A sparse network in C99, exported by torch-feather. See docs/native.md of torch-feather.

   All tensors are float32, contiguous, in the order of PyTorch. The batch size is fixed. */
#ifndef @GUARD@
#define @GUARD@

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define @UPPER@_WORKSPACE @WORKSPACE@ /* float32 numbers */
#define @UPPER@_CONSTANT_BYTES @CONSTANTS@
@SIZES@

/* Compute the outputs. The workspace holds the activations, and nothing between calls. Concurrent
   calls need a workspace each. */
@SIGNATURE@;

#ifdef __cplusplus
}
#endif

#endif
