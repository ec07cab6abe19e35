// A request's bytes and a target in, requests a second and latencies out: a load generator in C++.
//
//   load TARGET unary|stream CONNECTIONS IN_FLIGHT SECONDS REQUEST_FILE ANSWER_FILE|-
//
// Closed loop: IN_FLIGHT requests a connection, each answer followed by the next request; with
// `stream`, one stream a connection. Every answer is compared with ANSWER_FILE, unless that is "-".
// Prints one line: requests/s, and p50, p99 in microseconds.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using grpc::ByteBuffer;
using Clock = std::chrono::steady_clock;

static ByteBuffer g_request;
static std::string g_answer;
static bool g_check;
static bool g_stopping = false;
static Clock::time_point g_count_from;
static std::vector<float> g_latencies_us;

static std::string ReadFile(const char* path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    std::fprintf(stderr, "load: cannot read %s\n", path);
    std::exit(2);
  }
  std::stringstream all;
  all << in.rdbuf();
  return all.str();
}

static ByteBuffer ToBuffer(const std::string& bytes) {
  grpc::Slice slice(bytes);
  return ByteBuffer(&slice, 1);
}

static void Check(ByteBuffer& answer) {
  if (!g_check) return;
  grpc::Slice slice;
  answer.TrySingleSlice(&slice).ok() || answer.DumpToSingleSlice(&slice).ok();
  if (slice.size() != g_answer.size() || std::memcmp(slice.begin(), g_answer.data(), slice.size()) != 0) {
    std::fprintf(stderr, "load: an answer differs from what was expected (%zu bytes, expected %zu)\n",
                 slice.size(), g_answer.size());
    std::exit(1);
  }
}

static void Count(Clock::time_point sent) {
  auto now = Clock::now();
  if (now >= g_count_from)
    g_latencies_us.push_back(std::chrono::duration<float, std::micro>(now - sent).count());
}

static void Fail(const grpc::Status& status) {
  std::fprintf(stderr, "load: call failed: %d %s\n", status.error_code(), status.error_message().c_str());
  std::exit(1);
}

// What a completion queue's event wakes up.
struct Event {
  virtual void Proceed(bool ok) = 0;
  virtual ~Event() = default;
};

struct Unary : Event {
  grpc::GenericStub* stub;
  grpc::CompletionQueue* queue;
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<grpc::ClientAsyncResponseReader<ByteBuffer>> reader;
  ByteBuffer answer;
  grpc::Status status;
  Clock::time_point sent;

  void Start() {
    context = std::make_unique<grpc::ClientContext>();
    sent = Clock::now();
    reader = stub->PrepareUnaryCall(context.get(), "/nnproto.v1.Inference/Predict", g_request, queue);
    reader->StartCall();
    reader->Finish(&answer, &status, this);
  }
  void Proceed(bool) override {
    if (!status.ok()) Fail(status);
    Check(answer);
    Count(sent);
    if (!g_stopping) Start();
  }
};

struct Stream : Event {
  struct Step : Event {
    Stream* stream;
    void (Stream::*then)(bool);
    Step(Stream* s, void (Stream::*t)(bool)) : stream(s), then(t) {}
    void Proceed(bool ok) override { (stream->*then)(ok); }
  };

  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> io;
  ByteBuffer answer;
  std::deque<Clock::time_point> sent;
  int in_flight;
  bool is_writing = false;
  Step written{this, &Stream::Written}, read{this, &Stream::Read};

  Stream(grpc::GenericStub* stub, grpc::CompletionQueue* queue, int n) : in_flight(n) {
    io = stub->PrepareCall(&context, "/nnproto.v1.Inference/PredictStream", queue);
    io->StartCall(this);
  }
  void Proceed(bool ok) override {
    if (!ok) Fail(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the stream could not be opened"));
    io->Read(&answer, &read);
    Write();
  }
  void Write() {
    if (is_writing || g_stopping || static_cast<int>(sent.size()) >= in_flight) return;
    is_writing = true;
    sent.push_back(Clock::now());
    io->Write(g_request, &written);
  }
  void Written(bool ok) {
    is_writing = false;
    if (ok) Write();
  }
  void Read(bool ok) {
    if (!ok) {
      if (!g_stopping) Fail(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the stream has ended"));
      return;
    }
    Check(answer);
    Count(sent.front());
    sent.pop_front();
    io->Read(&answer, &read);
    Write();
  }
};

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr,
                 "usage: load TARGET unary|stream CONNECTIONS IN_FLIGHT SECONDS REQUEST_FILE ANSWER_FILE|-\n");
    return 2;
  }
  const bool is_stream = std::string(argv[2]) == "stream";
  const int connections = std::atoi(argv[3]), in_flight = std::atoi(argv[4]);
  const double seconds = std::atof(argv[5]);
  g_request = ToBuffer(ReadFile(argv[6]));
  g_check = std::string(argv[7]) != "-";
  if (g_check) g_answer = ReadFile(argv[7]);
  g_latencies_us.reserve(1 << 22);

  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  std::vector<std::unique_ptr<Event>> events;
  for (int c = 0; c < connections; ++c) {
    grpc::ChannelArguments options;
    options.SetInt("load.connection", c);  // A channel of its own: equal ones share a connection.
    options.SetMaxReceiveMessageSize(-1);
    stubs.push_back(std::make_unique<grpc::GenericStub>(
        grpc::CreateCustomChannel(argv[1], grpc::InsecureChannelCredentials(), options)));
  }
  const auto start = Clock::now();
  const double warm_up = std::min(1.0, seconds / 3);
  g_count_from = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(warm_up));
  const auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  for (auto& stub : stubs) {
    if (is_stream) {
      events.push_back(std::make_unique<Stream>(stub.get(), &queue, in_flight));
    } else {
      for (int i = 0; i < in_flight; ++i) {
        auto call = std::make_unique<Unary>();
        call->stub = stub.get();
        call->queue = &queue;
        call->Start();
        events.push_back(std::move(call));
      }
    }
  }
  void* tag;
  bool ok;
  while (Clock::now() < end && queue.Next(&tag, &ok)) static_cast<Event*>(tag)->Proceed(ok);
  const double counted = std::chrono::duration<double>(Clock::now() - g_count_from).count();
  g_stopping = true;
  if (g_latencies_us.empty()) return 1;
  const auto count = g_latencies_us.size();
  std::sort(g_latencies_us.begin(), g_latencies_us.end());
  std::printf("{\"rate\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"requests\": %zu}\n", count / counted,
              g_latencies_us[count / 2], g_latencies_us[count * 99 / 100], count);
  std::fflush(stdout);
  std::_Exit(0);  // Calls in flight are the server's to forget.
}
