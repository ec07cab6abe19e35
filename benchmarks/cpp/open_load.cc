// A rate, a request's bytes and a target in; what became of the requests out: an open-loop generator in C++.
//
//   open_load TARGET CONNECTIONS RATE WARM_UP_S SECONDS DEADLINE_MS REQUEST_FILE ANSWER_FILE
//
// Requests are due at the times of a Poisson process, answered or not, and go over the connections in turn.
// Latency counts from when a request was due. DEADLINE_MS 0: they wait for ever. Every answer is compared
// with ANSWER_FILE. Prints one line of JSON over the SECONDS after the warm-up: requests offered, answered,
// refused, expired and failed otherwise; goodput (answers a second that arrived in that time); latencies in
// milliseconds of answers and of refusals; how late requests were sent.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

using grpc::ByteBuffer;
using Clock = std::chrono::steady_clock;

static ByteBuffer g_request;
static std::string g_answer;
static int g_deadline_ms;
static Clock::time_point g_begin, g_end;
static long g_offered, g_answered, g_refused, g_expired, g_failed, g_in_time, g_outstanding;
static std::vector<float> g_answer_ms, g_refusal_ms, g_lag_ms;

static std::string ReadFile(const char* path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    std::fprintf(stderr, "open_load: cannot read %s\n", path);
    std::exit(2);
  }
  std::stringstream all;
  all << in.rdbuf();
  return all.str();
}

static float Milliseconds(Clock::duration d) { return std::chrono::duration<float, std::milli>(d).count(); }

static Clock::duration Seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

struct Request {
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientAsyncResponseReader<ByteBuffer>> reader;
  ByteBuffer answer;
  grpc::Status status;
  Clock::time_point due;

  void Start(grpc::GenericStub* stub, grpc::CompletionQueue* queue) {
    if (g_deadline_ms)
      context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(g_deadline_ms));
    reader = stub->PrepareUnaryCall(&context, "/nnproto.v1.Inference/Predict", g_request, queue);
    reader->StartCall();
    reader->Finish(&answer, &status, this);
    ++g_outstanding;
    if (due >= g_begin && due < g_end) {
      ++g_offered;
      g_lag_ms.push_back(Milliseconds(Clock::now() - due));
    }
  }

  void Finish() {
    --g_outstanding;
    const auto now = Clock::now();
    if (status.ok()) {
      grpc::Slice slice;
      answer.TrySingleSlice(&slice).ok() || answer.DumpToSingleSlice(&slice).ok();
      if (slice.size() != g_answer.size() || std::memcmp(slice.begin(), g_answer.data(), slice.size()) != 0) {
        std::fprintf(stderr, "open_load: an answer differs from what was expected\n");
        std::exit(1);
      }
      if (now >= g_begin && now < g_end) ++g_in_time;
    }
    if (due < g_begin || due >= g_end) return;
    if (status.ok()) {
      ++g_answered;
      g_answer_ms.push_back(Milliseconds(now - due));
    } else if (status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) {
      ++g_refused;
      g_refusal_ms.push_back(Milliseconds(now - due));
    } else if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
      ++g_expired;
    } else if (!g_failed++) {
      std::fprintf(stderr, "open_load: %d %s\n", status.error_code(), status.error_message().c_str());
    }
  }
};

static float Quantile(std::vector<float>& values, double q) {
  if (values.empty()) return -1;
  const auto at = values.begin() + static_cast<long>(q * (values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

int main(int argc, char** argv) {
  if (argc != 9) {
    std::fprintf(stderr,
                 "usage: open_load TARGET CONNECTIONS RATE WARM_UP_S SECONDS DEADLINE_MS REQUEST_FILE ANSWER_FILE\n");
    return 2;
  }
  const int connections = std::atoi(argv[2]);
  const double rate = std::atof(argv[3]), warm_up_s = std::atof(argv[4]), seconds = std::atof(argv[5]);
  g_deadline_ms = std::atoi(argv[6]);
  grpc::Slice slice(ReadFile(argv[7]));
  g_request = ByteBuffer(&slice, 1);
  g_answer = ReadFile(argv[8]);

  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  for (int c = 0; c < connections; ++c) {
    grpc::ChannelArguments options;
    options.SetInt("open_load.connection", c);  // A channel of its own: equal ones share a connection.
    auto channel = grpc::CreateCustomChannel(argv[1], grpc::InsecureChannelCredentials(), options);
    if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10))) return 1;
    stubs.push_back(std::make_unique<grpc::GenericStub>(channel));
  }
  std::mt19937_64 random(1);
  std::exponential_distribution<double> gap(rate);
  const auto start = Clock::now();
  g_begin = start + Seconds(warm_up_s);
  g_end = g_begin + Seconds(seconds);
  auto due = start + Seconds(gap(random));
  long number = 0;
  // Until all are answered, or for five seconds more.
  while (due < g_end || (g_outstanding && Clock::now() < g_end + Seconds(5))) {
    while (due < g_end && due <= Clock::now()) {
      auto request = new Request;
      request->due = due;
      request->Start(stubs[number++ % connections].get(), &queue);
      due += Seconds(gap(random));
    }
    void* tag;
    bool ok;
    const auto pause = due < g_end ? due - Clock::now() : Seconds(0.1);
    const auto wake = std::chrono::system_clock::now() +
                      std::chrono::duration_cast<std::chrono::system_clock::duration>(pause);
    if (queue.AsyncNext(&tag, &ok, wake) == grpc::CompletionQueue::GOT_EVENT) {
      auto request = static_cast<Request*>(tag);
      request->Finish();
      delete request;
    }
  }
  const float p50 = Quantile(g_answer_ms, 0.5), p99 = Quantile(g_answer_ms, 0.99);
  std::printf(
      "{\"offered\": %ld, \"answered\": %ld, \"refused\": %ld, \"expired\": %ld, \"failed\": %ld, "
      "\"unanswered\": %ld, \"goodput\": %.1f, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"refusal_p99_ms\": %.3f, "
      "\"lag_p99_ms\": %.3f}\n",
      g_offered, g_answered, g_refused, g_expired, g_failed,
      g_offered - g_answered - g_refused - g_expired - g_failed, g_in_time / seconds, p50, p99,
      Quantile(g_refusal_ms, 0.99), Quantile(g_lag_ms, 0.99));
  std::fflush(stdout);
  std::_Exit(0);  // Calls in flight are the server's to forget.
}
