// Runs the network on an input of zeros and prints the first outputs.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "@NAME@.h"

int main()
{
    @NAME@ *created = nullptr;
    if (@NAME@_create(&created, 1) != @UPPER@_OK)
        return 2;
    std::unique_ptr<@NAME@, decltype(&@NAME@_destroy)> model(created, @NAME@_destroy);

    std::vector<float> input(@NAME@_input(0)->size, 0.0f);
    std::vector<std::vector<float>> results;
    std::vector<float *> outputs;
    for (std::int32_t i = 0; i < @UPPER@_OUTPUTS; i++)
        results.emplace_back(@NAME@_output(i)->size);
    for (auto &result : results)
        outputs.push_back(result.data());

    const float *inputs[] = {input.data()};
    if (@NAME@_run(model.get(), inputs, outputs.data()) != @UPPER@_OK)
        return 2;
    for (std::size_t i = 0; i < results[0].size() && i < 10; i++)
        std::printf("%g\n", results[0][i]);
}
