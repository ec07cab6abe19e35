// Any request in, a constant answer out: what gRPC's C++ callback API costs, with no work done.
//
//   echo_server HOST:PORT ANSWER_BYTES
//
// Raw ByteBuffers, so that no protobuf object is built: the fastest that this API can be.

#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "nnproto/v1/inference.grpc.pb.h"

using grpc::ByteBuffer;
using nnproto::v1::Inference;

static ByteBuffer g_answer;

class Stream : public grpc::ServerBidiReactor<ByteBuffer, ByteBuffer> {
 public:
  Stream() { StartRead(&message_); }
  void OnReadDone(bool ok) override {
    if (ok) StartWrite(&g_answer);
    else Finish(grpc::Status::OK);
  }
  void OnWriteDone(bool ok) override {
    if (ok) StartRead(&message_);
    else Finish(grpc::Status::CANCELLED);
  }
  void OnDone() override { delete this; }

 private:
  ByteBuffer message_;
};

class Echo : public Inference::WithRawCallbackMethod_Predict<
                 Inference::WithRawCallbackMethod_PredictStream<Inference::Service>> {
 public:
  grpc::ServerUnaryReactor* Predict(grpc::CallbackServerContext* context, const ByteBuffer*,
                                    ByteBuffer* response) override {
    *response = g_answer;
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>* PredictStream(grpc::CallbackServerContext*) override {
    return new Stream();
  }
};

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: echo_server HOST:PORT ANSWER_BYTES\n");
    return 2;
  }
  grpc::Slice answer(std::string(std::atoi(argv[2]), '\0'));
  g_answer = ByteBuffer(&answer, 1);
  Echo service;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(-1);
  builder.AddListeningPort(argv[1], grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  auto server = builder.BuildAndStart();
  if (!server) return 1;
  std::printf("echo ready on 127.0.0.1:%d;\n", port);
  std::fflush(stdout);
  server->Wait();
}
