// k6: 4 users, 400 requests in all; a check that fails makes k6 exit with a status other than 0.
import { check } from "k6";
import grpc from "k6/net/grpc";

const client = new grpc.Client();
client.load([__ENV.PROTO], "nnproto/oip/inference.proto");

export const options = { vus: 4, iterations: 400, thresholds: { checks: ["rate==1"] } };

const request = {
  model_name: "iris",
  inputs: [{ name: "inputs", datatype: "FP32", shape: [1, 4], contents: { fp32_contents: [1, 2, 3, 4] } }],
};

export default () => {
  if (__ITER === 0) client.connect(__ENV.TARGET, { plaintext: true });
  const answer = client.invoke("inference.GRPCInferenceService/ModelInfer", request);
  check(answer, {
    "is answered": (answer) => answer.status === grpc.StatusOK && answer.message.outputs.length === 3,
  });
};
