// What every plan of a deployed network begins with, so that nothing else is taken for one.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mfk {

// To be changed with the fields of any plan.
constexpr int64_t kPlanFormat = 8;

struct PlanSeal {
  int64_t format;
  int64_t checksum;  // of all that follows
  int64_t classes;
};
constexpr int64_t kSealWords = sizeof(PlanSeal) / 8;

// Other numbers for any change of a single word: each step loses nothing of what it is given.
inline int64_t plan_checksum(const int64_t* words, int64_t count) {
  uint64_t sum = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < count; ++i) {
    sum = (sum ^ static_cast<uint64_t>(words[i])) * 0x100000001b3u;
    sum ^= sum >> 32;
  }
  return static_cast<int64_t>(sum);
}

inline std::vector<int64_t> sealed_plan(int64_t classes, const std::vector<int64_t>& plan) {
  std::vector<int64_t> words = {kPlanFormat, 0, classes};
  words.insert(words.end(), plan.begin(), plan.end());
  words[1] = plan_checksum(words.data() + 2, static_cast<int64_t>(words.size()) - 2);
  return words;
}

// Throws where this is no plan, or not as it was made.
inline void check_plan(const int64_t* words, int64_t count) {
  const int64_t format = count > kSealWords ? words[0] : 0;
  if (format != kPlanFormat) {
    throw std::runtime_error(
        "deploy: plan must have format " + std::to_string(kPlanFormat) + ", got " +
        (count > kSealWords ? std::to_string(format) : std::to_string(count) + " numbers") +
        ": another version of mfkernels made it; deploy the network again");
  }
  const int64_t sum = plan_checksum(words + 2, count - 2);
  if (words[1] != sum) {
    throw std::runtime_error("deploy: plan must have the checksum " + std::to_string(words[1]) + ", got " +
                             std::to_string(sum) + ": it was changed; deploy the network again");
  }
}

}  // namespace mfk
