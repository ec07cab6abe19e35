// TARGET -> one line of JSON: what @grpc/grpc-js is answered, with messages made from the .proto file.
"use strict";
const path = require("path");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const root = path.join(__dirname, "..", "..", "..", "proto");
const loaded = loadSync("nnproto/oip/inference.proto", { includeDirs: [root], keepCase: true, longs: Number, defaults: true });
const { GRPCInferenceService } = grpc.loadPackageDefinition(loaded).inference;
const client = new GRPCInferenceService(process.argv[2], grpc.credentials.createInsecure());

const rows = [[1, 2, 3, 4], [0.5, 0, -1, 2]];
const tensor = { name: "inputs", datatype: "FP32", shape: [2, 4] };
const typed = { model_name: "iris", id: "typed", inputs: [{ ...tensor, contents: { fp32_contents: rows.flat() } }] };
const raw = {
  model_name: "iris",
  id: "raw",
  inputs: [tensor],
  outputs: [{ name: "outputs" }],
  raw_input_contents: [Buffer.from(new Float32Array(rows.flat()).buffer)],
};

const call = (method, request) =>
  new Promise((resolve) => client[method](request, (error, answer) => resolve(error ? { error } : answer)));

const stream = (requests) =>
  new Promise((resolve, reject) => {
    const answers = [];
    const duplex = client.ModelStreamInfer();
    duplex.on("data", (answer) => answers.push([answer.infer_response.id, answer.error_message]));
    duplex.on("error", reject);
    duplex.on("end", () => resolve(answers));
    requests.forEach((request) => duplex.write(request));
    duplex.end();
  });

(async () => {
  const ofTyped = await call("ModelInfer", typed);
  const ofRaw = await call("ModelInfer", raw);
  const refused = await call("ModelInfer", { ...raw, model_name: "rose" });
  console.log(
    JSON.stringify({
      live: (await call("ServerLive", {})).live,
      typed: ofTyped.outputs.find((output) => output.name === "outputs").contents.fp32_contents,
      labels: ofTyped.outputs.find((output) => output.name === "labels").contents.bytes_contents.map(String),
      raw: Array.from(new Float32Array(Uint8Array.from(ofRaw.raw_output_contents[0]).buffer)),
      error: [refused.error.code, refused.error.details],
      stream: await stream([raw, { ...typed, model_name: "rose" }, typed]),
    }),
  );
  client.close();
})();
