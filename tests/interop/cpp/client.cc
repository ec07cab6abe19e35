// Names of cases in, one line a case out: NAME ok, or NAME failed REASON; on gRPC's C++ library.
//
//   client --target 127.0.0.1:50051 [--ca F [--certificate F --key F]] empty_unary large_unary ...
//   client --target unix:/path --predict MODEL --inputs HEX
//
// The second form sends one row of float32 to an nnserver and prints "predict HEX" of the outputs.

#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "interop/proto/test.grpc.pb.h"
#include "nnproto/v1/inference.grpc.pb.h"

namespace {

using grpc::ClientContext;
using grpc::Status;
using grpc::StatusCode;
using grpc::testing::Empty;
using grpc::testing::SimpleRequest;
using grpc::testing::SimpleResponse;
using grpc::testing::StreamingInputCallRequest;
using grpc::testing::StreamingInputCallResponse;
using grpc::testing::StreamingOutputCallRequest;
using grpc::testing::StreamingOutputCallResponse;
using grpc::testing::TestService;
using grpc::testing::UnimplementedService;
using std::chrono::milliseconds;
using std::chrono::system_clock;

constexpr milliseconds kPatience{60000};
constexpr int kLargeRequestBytes = 271828;
constexpr int kLargeResponseBytes = 314159;
constexpr int kRequestBytes[] = {27182, 8, 1828, 45904};
constexpr int kResponseBytes[] = {31415, 9, 2653, 58979};
constexpr int kConcurrentCalls = 32;
constexpr char kStatusMessage[] = "test status message";
constexpr char kSpecialStatusMessage[] =
    "\t\ntest with whitespace\r\nand Unicode BMP \u263A and non-BMP \U0001F608\t\n";
constexpr char kEchoInitial[] = "x-grpc-test-echo-initial";
constexpr char kInitialValue[] = "test_initial_metadata_value";
constexpr char kEchoTrailing[] = "x-grpc-test-echo-trailing-bin";
constexpr char kTrailingValue[] = "\xab\xab\xab";

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) {                                                           \
      throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition); \
    }                                                                             \
  } while (false)

// A context whose deadline a case that works never meets.
std::unique_ptr<ClientContext> Context(milliseconds timeout = kPatience, bool squeezes = false) {
  auto context = std::make_unique<ClientContext>();
  context->set_deadline(system_clock::now() + timeout);
  if (squeezes) context->set_compression_algorithm(GRPC_COMPRESS_GZIP);
  return context;
}

void ExpectOk(const Status& status) {
  if (!status.ok()) throw std::runtime_error("status " + std::to_string(status.error_code()) + " " + status.error_message());
}

std::string Zeros(int size) { return std::string(size, '\0'); }

SimpleRequest LargeRequest() {
  SimpleRequest request;
  request.set_response_size(kLargeResponseBytes);
  request.mutable_payload()->set_body(Zeros(kLargeRequestBytes));
  return request;
}

StreamingOutputCallRequest OutputRequest(std::vector<int> sizes, int size = 0) {
  StreamingOutputCallRequest request;
  for (int wanted : sizes) request.add_response_parameters()->set_size(wanted);
  request.mutable_payload()->set_body(Zeros(size));
  return request;
}

template <typename Stream>
void ExpectAnswer(Stream& stream, int size) {
  StreamingOutputCallResponse response;
  EXPECT(stream.Read(&response));
  EXPECT(response.payload().body() == Zeros(size));
}

template <typename Stream>
void ExpectEnd(Stream& stream) {
  StreamingOutputCallResponse response;
  EXPECT(!stream.Read(&response));
  ExpectOk(stream.Finish());
}

bool Has(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata, const char* name, const char* value) {
  auto found = metadata.find(name);
  return found != metadata.end() && found->second == value;
}

// The cases. Each throws if it fails.
class Cases {
 public:
  explicit Cases(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(TestService::NewStub(channel)), no_service_(UnimplementedService::NewStub(channel)) {}

  void EmptyUnary() {
    Empty response;
    ExpectOk(stub_->EmptyCall(Context().get(), Empty(), &response));
    EXPECT(response.ByteSizeLong() == 0);
  }

  void LargeUnary(bool squeezes = false) {
    SimpleResponse response;
    ExpectOk(stub_->UnaryCall(Context(kPatience, squeezes).get(), LargeRequest(), &response));
    EXPECT(response.payload().body() == Zeros(kLargeResponseBytes));
  }

  void ClientStreaming(bool squeezes = false) {
    auto context = Context(kPatience, squeezes);
    StreamingInputCallResponse response;
    auto stream = stub_->StreamingInputCall(context.get(), &response);
    for (int size : kRequestBytes) {
      StreamingInputCallRequest request;
      request.mutable_payload()->set_body(Zeros(size));
      EXPECT(stream->Write(request));
    }
    EXPECT(stream->WritesDone());
    ExpectOk(stream->Finish());
    EXPECT(response.aggregated_payload_size() == 74922);
  }

  void ServerStreaming() {
    auto context = Context();
    auto stream = stub_->StreamingOutputCall(
        context.get(), OutputRequest({std::begin(kResponseBytes), std::end(kResponseBytes)}));
    for (int size : kResponseBytes) ExpectAnswer(*stream, size);
    ExpectEnd(*stream);
  }

  void PingPong(bool squeezes = false) {
    auto context = Context(kPatience, squeezes);
    auto stream = stub_->FullDuplexCall(context.get());
    for (size_t i = 0; i < std::size(kRequestBytes); ++i) {
      EXPECT(stream->Write(OutputRequest({kResponseBytes[i]}, kRequestBytes[i])));
      ExpectAnswer(*stream, kResponseBytes[i]);
    }
    EXPECT(stream->WritesDone());
    ExpectEnd(*stream);
  }

  void EmptyStream() {
    auto context = Context();
    auto stream = stub_->FullDuplexCall(context.get());
    EXPECT(stream->WritesDone());
    ExpectEnd(*stream);
  }

  void HalfDuplex() {
    auto context = Context();
    auto stream = stub_->HalfDuplexCall(context.get());
    for (int size : kResponseBytes) EXPECT(stream->Write(OutputRequest({size})));
    EXPECT(stream->WritesDone());
    for (int size : kResponseBytes) ExpectAnswer(*stream, size);
    ExpectEnd(*stream);
  }

  void CancelAfterBegin() {
    auto context = Context();
    StreamingInputCallResponse response;
    auto stream = stub_->StreamingInputCall(context.get(), &response);
    context->TryCancel();
    EXPECT(stream->Finish().error_code() == StatusCode::CANCELLED);
  }

  void CancelAfterFirstResponse() {
    auto context = Context();
    auto stream = stub_->FullDuplexCall(context.get());
    EXPECT(stream->Write(OutputRequest({kResponseBytes[0]}, kRequestBytes[0])));
    ExpectAnswer(*stream, kResponseBytes[0]);
    context->TryCancel();
    EXPECT(stream->Finish().error_code() == StatusCode::CANCELLED);
  }

  void TimeoutOnSleepingServer() {
    for (milliseconds timeout : {milliseconds(1), milliseconds(200)}) {
      auto context = Context(timeout);
      auto stream = stub_->FullDuplexCall(context.get());
      StreamingOutputCallRequest request = OutputRequest({1});
      request.mutable_response_parameters(0)->set_interval_us(30000000);
      stream->Write(request);  // It may come too late.
      StreamingOutputCallResponse response;
      EXPECT(!stream->Read(&response));
      EXPECT(stream->Finish().error_code() == StatusCode::DEADLINE_EXCEEDED);
    }
  }

  void ExpectStatus(const std::string& message) {
    SimpleRequest request;
    request.mutable_response_status()->set_code(2);
    request.mutable_response_status()->set_message(message);
    SimpleResponse response;
    Status of_unary = stub_->UnaryCall(Context().get(), request, &response);
    auto context = Context();
    auto stream = stub_->FullDuplexCall(context.get());
    StreamingOutputCallRequest output_request;
    *output_request.mutable_response_status() = request.response_status();
    EXPECT(stream->Write(output_request));
    stream->WritesDone();
    StreamingOutputCallResponse output_response;
    EXPECT(!stream->Read(&output_response));
    for (const Status& status : {of_unary, stream->Finish()}) {
      EXPECT(status.error_code() == StatusCode::UNKNOWN);
      EXPECT(status.error_message() == message);
    }
  }

  void CustomMetadata() {
    auto unary = Context(), duplex = Context();
    for (ClientContext* context : {unary.get(), duplex.get()}) {
      context->AddMetadata(kEchoInitial, kInitialValue);
      context->AddMetadata(kEchoTrailing, kTrailingValue);
    }
    SimpleResponse response;
    ExpectOk(stub_->UnaryCall(unary.get(), LargeRequest(), &response));
    auto stream = stub_->FullDuplexCall(duplex.get());
    EXPECT(stream->Write(OutputRequest({kResponseBytes[0]}, kRequestBytes[0])));
    EXPECT(stream->WritesDone());
    ExpectAnswer(*stream, kResponseBytes[0]);
    ExpectEnd(*stream);
    for (ClientContext* context : {unary.get(), duplex.get()}) {
      EXPECT(Has(context->GetServerInitialMetadata(), kEchoInitial, kInitialValue));
      EXPECT(Has(context->GetServerTrailingMetadata(), kEchoTrailing, kTrailingValue));
    }
  }

  void UnimplementedMethod() {
    Empty response;
    Status status = stub_->UnimplementedCall(Context().get(), Empty(), &response);
    EXPECT(status.error_code() == StatusCode::UNIMPLEMENTED);
  }

  void UnimplementedServiceCase() {
    Empty response;
    Status status = no_service_->UnimplementedCall(Context().get(), Empty(), &response);
    EXPECT(status.error_code() == StatusCode::UNIMPLEMENTED);
  }

  void GzipStreaming() {
    ClientStreaming(true);
    PingPong(true);
  }

  // Says "begun" after the first answer, so that the test can end the server before the second.
  void FinishWhileDraining() {
    auto context = Context();
    StreamingOutputCallRequest request = OutputRequest({1, 2});
    request.mutable_response_parameters(1)->set_interval_us(500000);
    auto stream = stub_->StreamingOutputCall(context.get(), request);
    ExpectAnswer(*stream, 1);
    std::cout << "finish_while_draining begun" << std::endl;
    ExpectAnswer(*stream, 2);
    ExpectEnd(*stream);
  }

  void ConcurrentLargeUnary() {
    std::vector<std::string> failures(kConcurrentCalls);
    std::vector<std::thread> threads;
    for (std::string& failure : failures) {
      threads.emplace_back([this, &failure] {
        try {
          LargeUnary();
        } catch (const std::exception& error) {
          failure = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& failure : failures) {
      if (!failure.empty()) throw std::runtime_error(failure);
    }
  }

 private:
  std::unique_ptr<TestService::Stub> stub_;
  std::unique_ptr<UnimplementedService::Stub> no_service_;
};

const std::map<std::string, std::function<void(Cases&)>> kCases = {
    {"empty_unary", &Cases::EmptyUnary},
    {"large_unary", [](Cases& cases) { cases.LargeUnary(); }},
    {"client_streaming", [](Cases& cases) { cases.ClientStreaming(); }},
    {"server_streaming", &Cases::ServerStreaming},
    {"ping_pong", [](Cases& cases) { cases.PingPong(); }},
    {"empty_stream", &Cases::EmptyStream},
    {"half_duplex", &Cases::HalfDuplex},
    {"cancel_after_begin", &Cases::CancelAfterBegin},
    {"cancel_after_first_response", &Cases::CancelAfterFirstResponse},
    {"timeout_on_sleeping_server", &Cases::TimeoutOnSleepingServer},
    {"status_code_and_message", [](Cases& cases) { cases.ExpectStatus(kStatusMessage); }},
    {"special_status_message", [](Cases& cases) { cases.ExpectStatus(kSpecialStatusMessage); }},
    {"custom_metadata", &Cases::CustomMetadata},
    {"unimplemented_method", &Cases::UnimplementedMethod},
    {"unimplemented_service", &Cases::UnimplementedServiceCase},
    {"gzip_unary", [](Cases& cases) { cases.LargeUnary(true); }},
    {"gzip_streaming", &Cases::GzipStreaming},
    {"finish_while_draining", &Cases::FinishWhileDraining},
    {"concurrent_large_unary", &Cases::ConcurrentLargeUnary},
};

std::string Contents(const std::string& file) {
  std::ostringstream contents;
  contents << std::ifstream(file, std::ios::binary).rdbuf();
  return contents.str();
}

std::shared_ptr<grpc::Channel> Connect(std::map<std::string, std::string>& options) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (options.count("--ca")) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = Contents(options["--ca"]);
    if (options.count("--key")) {
      ssl.pem_private_key = Contents(options["--key"]);
      ssl.pem_cert_chain = Contents(options["--certificate"]);
    }
    credentials = grpc::SslCredentials(ssl);
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(options["--target"], credentials, arguments);
}

void Predict(std::map<std::string, std::string>& options) {
  nnproto::v1::PredictRequest request;
  request.set_model(options["--predict"]);
  const std::string& inputs = options["--inputs"];
  std::string data;
  for (size_t i = 0; i < inputs.size(); i += 2) data += char(std::stoi(inputs.substr(i, 2), nullptr, 16));
  request.mutable_inputs()->add_shape(data.size() / 4);
  request.mutable_inputs()->set_dtype(nnproto::v1::DATA_TYPE_FLOAT32);
  request.mutable_inputs()->set_data(data);
  nnproto::v1::PredictResponse response;
  auto stub = nnproto::v1::Inference::NewStub(Connect(options));
  Status status = stub->Predict(Context().get(), request, &response);
  if (!status.ok()) {
    std::printf("predict failed %s\n", status.error_message().c_str());
    return;
  }
  std::printf("predict ");
  for (unsigned char byte : response.outputs().data()) std::printf("%02x", byte);
  std::printf("\n");
}

void RunCase(const std::string& name, std::map<std::string, std::string>& options) {
  try {
    Cases cases(Connect(options));
    kCases.at(name)(cases);
    std::cout << name << " ok" << std::endl;
  } catch (const std::exception& error) {
    std::cout << name << " failed " << error.what() << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    std::string argument = argv[i];
    if (argument.rfind("--", 0) == 0 && i + 1 < argc) {
      options[argument] = argv[++i];
    } else {
      names.push_back(argument);
    }
  }
  if (options.count("--predict")) Predict(options);
  for (const std::string& name : names) RunCase(name, options);
}
