/* Runs the network on the input of example_data.h and compares with the output that PyTorch
   computed. Exit status 0: they agree to 1e-5 of the largest output. */
#include <math.h>
#include <stdio.h>

#include "@NAME@.h"
#include "example_data.h"

static float workspace[@UPPER@_WORKSPACE + 1];
@BUFFERS@

int main(void)
{
    float difference = 0, largest = 0;

    @NAME@_run(workspace, example_input@ARGUMENTS@);
    for (int32_t i = 0; i < @UPPER@_OUTPUT_0_SIZE; i++) {
        float d = fabsf(output_0[i] - example_output[i]);
        difference = d <= difference ? difference : d; /* keeps NaN */
        largest = fmaxf(largest, fabsf(example_output[i]));
    }
    printf("workspace %ld bytes, constants %ld bytes, largest difference %.1e of the largest output\n",
           4L * @UPPER@_WORKSPACE, (long)@UPPER@_CONSTANT_BYTES, (double)(difference / largest));
    return difference <= 1e-5f * largest ? 0 : 1;
}
