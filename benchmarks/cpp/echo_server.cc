// A PredictRequest's bytes in, the same bytes out: what gRPC's C++ callback API costs, with no work done.
//
//   echo_server HOST:PORT
//
// Raw ByteBuffers, so that no protobuf object is built: the fastest that this API can be.

#include <grpcpp/grpcpp.h>

#include <cstdio>

#include "nnproto/v1/inference.grpc.pb.h"

using grpc::ByteBuffer;
using nnproto::v1::Inference;

class Stream : public grpc::ServerBidiReactor<ByteBuffer, ByteBuffer> {
 public:
  Stream() { StartRead(&message_); }
  void OnReadDone(bool ok) override {
    if (ok) StartWrite(&message_);
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
  grpc::ServerUnaryReactor* Predict(grpc::CallbackServerContext* context, const ByteBuffer* request,
                                    ByteBuffer* response) override {
    *response = *request;
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  grpc::ServerBidiReactor<ByteBuffer, ByteBuffer>* PredictStream(grpc::CallbackServerContext*) override {
    return new Stream();
  }
};

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: echo_server HOST:PORT\n");
    return 2;
  }
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
