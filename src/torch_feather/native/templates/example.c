/* Runs the network on example_input.bin and compares with example_output.bin, which PyTorch
   computed. Exit status 0: they agree to 1e-5 of the largest output. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "@NAME@.h"

static float *read_numbers(const char *path, int64_t count)
{
    float *numbers = malloc((size_t)count * sizeof(float));
    FILE *file = fopen(path, "rb");
    if (!numbers || !file || fread(numbers, sizeof(float), (size_t)count, file) != (size_t)count) {
        fprintf(stderr, "%s: cannot read %ld numbers\n", path, (long)count);
        exit(2);
    }
    fclose(file);
    return numbers;
}

int main(int argc, char **argv)
{
    const @NAME@_tensor *in = @NAME@_input(0), *out = @NAME@_output(0);
    const float *inputs[@UPPER@_INPUTS];
    float *outputs[@UPPER@_OUTPUTS], *expected;
    float difference = 0, largest = 0;
    @NAME@ *model;
    int32_t result;

    inputs[0] = read_numbers(argc > 1 ? argv[1] : "example_input.bin", in->size);
    expected = read_numbers(argc > 2 ? argv[2] : "example_output.bin", out->size);
    for (int32_t i = 0; i < @UPPER@_OUTPUTS; i++)
        outputs[i] = malloc((size_t)@NAME@_output(i)->size * sizeof(float));

    result = @NAME@_create(&model, 1);
    if (result == @UPPER@_OK)
        result = @NAME@_run(model, inputs, outputs);
    if (result != @UPPER@_OK) {
        fprintf(stderr, "error %d\n", (int)result);
        return 2;
    }
    @NAME@_destroy(model);

    for (int64_t i = 0; i < out->size; i++) {
        float d = fabsf(outputs[0][i] - expected[i]);
        difference = d <= difference ? difference : d; /* keeps NaN */
        largest = fmaxf(largest, fabsf(expected[i]));
    }
    printf("%s -> %s: largest difference %g of the largest output\n", in->name, out->name,
           (double)(difference / largest));
    return difference <= 1e-5f * largest ? 0 : 1;
}
