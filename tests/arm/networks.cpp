// Deployed networks without PyTorch: the mean of images' largest errors, in units of the largest output, must
// be at most twice that of the plain network, and two roundings.
//   networks FOLDER NAME ...: of files that tests/arm/networks.py wrote
// Or calls one, with an image of so many pixels a side, for benchmarks/arm_counts, which counts instructions
// between calls of getppid:
//   networks --calls COUNT SIDE CLASSES PATH: reads PATH.plan, PATH.weights and PATH.image, writes PATH.out
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "../../csrc/ops/network.h"

namespace {

constexpr int64_t kClasses = 10;

template <class T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<T> values(file.tellg() / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(T));
  return values;
}

double largest_error(const float* values, const float* truth, int64_t count) {
  double error = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double off = std::abs(static_cast<double>(values[i]) - truth[i]);
    error = off <= error ? error : off;  // NaN stays
    largest = std::max(largest, std::abs(static_cast<double>(truth[i])));
  }
  return error / largest;
}

// Puts the outputs for a batch of images into `out`.
void run(const std::vector<int64_t>& plan, const std::vector<float>& weights, float* images, int64_t batch,
         int64_t height, int64_t width, int64_t classes, float* out) {
  const int64_t pixels = height * width;
  const mfk::Images map{images, batch, height, width, 3 * pixels, pixels, width, 1};
  const mfk::Network network(plan.data(), weights.data(), map);
  mfk::run_network(network, batch, classes, out, 1, [](int64_t tasks, auto f) { f(0, tasks); }, [] {});
}

// Whether the errors of all images together are small enough.
bool check(const std::string& folder, const std::string& name) {
  const auto plan = read<int64_t>(folder + "/" + name + ".plan");
  const auto weights = read<float>(folder + "/" + name + ".weights");
  auto images = read<float>(folder + "/" + name + ".images");
  mfk::PlanCheck::run(plan.data(), plan.size(), weights.size(), kClasses);
  double ours = 0, plain = 0;
  int64_t calls = 0;
  for (float* at = images.data(); at < images.data() + images.size(); ++calls) {
    const int64_t batch = at[0], height = at[1], width = at[2], pixels = height * width,
                  count = batch * kClasses;
    float* x = at + 3;
    const float *reference = x + batch * 3 * pixels, *truth = reference + count;
    at = x + batch * 3 * pixels + 2 * count;
    std::vector<float> out(count);
    run(plan, weights, x, batch, height, width, kClasses, out.data());
    ours += largest_error(out.data(), truth, count);
    plain += largest_error(reference, truth, count);
  }
  std::printf("%s: mean of %d errors %.2g, of the plain network %.2g\n", name.c_str(),
              static_cast<int>(calls), ours / calls, plain / calls);
  return calls > 0 && ours <= 2 * plain + calls * 1.2e-7;
}

void call(int64_t count, int64_t side, int64_t classes, const std::string& path) {
  const auto plan = read<int64_t>(path + ".plan");
  const auto weights = read<float>(path + ".weights");
  auto image = read<float>(path + ".image");
  mfk::PlanCheck::run(plan.data(), plan.size(), weights.size(), classes);
  std::vector<float> out(classes);
  for (int64_t i = 0; i < count; ++i) {
    getppid();
    run(plan, weights, image.data(), 1, side, side, classes, out.data());
  }
  getppid();
  std::ofstream(path + ".out", std::ios::binary)
      .write(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(float));
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 6 && std::strcmp(arguments[1], "--calls") == 0) {
    call(std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4]), arguments[5]);
    return 0;
  }
  bool good = count > 2;
  for (int i = 2; i < count; ++i) good = check(arguments[1], arguments[i]) && good;
  return good ? 0 : 1;
}
