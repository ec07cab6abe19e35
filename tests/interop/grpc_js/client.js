// Names of cases in, one line a case out: NAME ok, or NAME failed REASON; on @grpc/grpc-js.
//
//   node client.js --target 127.0.0.1:50051 [--ca F [--certificate F --key F]] empty_unary large_unary ...
//   node client.js --target unix:/path --predict MODEL --inputs HEX
//
// The second form sends one row of float32 to an nnserver and prints "predict HEX" of the outputs.

"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { parseArgs } = require("node:util");

const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const TESTS = path.join(__dirname, "..", "..");
const PATIENCE_MS = 60_000;

const REQUEST_BYTES = [27182, 8, 1828, 45904];
const RESPONSE_BYTES = [31415, 9, 2653, 58979];
const LARGE_REQUEST = { responseSize: 314159, payload: { body: Buffer.alloc(271828) } };
const LARGE_RESPONSE_BYTES = 314159;
const CONCURRENT_CALLS = 32;
const STATUS_MESSAGE = "test status message";
const SPECIAL_STATUS_MESSAGE = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
const ECHO_INITIAL = ["x-grpc-test-echo-initial", "test_initial_metadata_value"];
const ECHO_TRAILING = ["x-grpc-test-echo-trailing-bin", Buffer.from([0xab, 0xab, 0xab])];

function load(file, folder) {
  return grpc.loadPackageDefinition(protoLoader.loadSync(file, { includeDirs: [folder], longs: Number }));
}

// Options of a call: a deadline that a case which works never meets.
const patient = () => ({ deadline: Date.now() + PATIENCE_MS });

const payload = (size) => ({ body: Buffer.alloc(size) });
const outputRequest = (sizes, size = 0) => ({
  responseParameters: sizes.map((wanted) => ({ size: wanted })),
  payload: payload(size),
});

// Return [response, initial metadata, status] of a call with one answer; *begin* is given a callback.
async function single(begin) {
  let initial, status;
  const response = await new Promise((resolve) => {
    let answer = null;
    const call = begin((error, value) => {
      answer = value;
    });
    call.on("metadata", (metadata) => (initial = metadata));
    call.on("status", (found) => {
      status = found;
      setImmediate(() => resolve(answer)); // The callback may come after it.
    });
  });
  return [response, initial, status];
}

async function unary(client, method, request, metadata = new grpc.Metadata(), options = patient()) {
  return single((callback) => client[method](request, metadata, options, callback));
}

async function ok(call) {
  const [response, , status] = await call;
  assert.equal(status.code, grpc.status.OK, status.details);
  return response;
}

// A call with many answers: `next` returns one, or null at the end; `status` resolves at the end.
class Answers {
  constructor(call) {
    this.call = call;
    this.initial = new Promise((resolve) => call.on("metadata", resolve));
    this.status = new Promise((resolve) => call.on("status", resolve));
    call.on("error", () => {}); // The status says the same.
    this.waiting = [];
    this.items = [];
    call.on("data", (item) => this.push(item));
    call.on("end", () => this.push(null));
    this.status.then((status) => status.code !== grpc.status.OK && this.push(null));
  }

  push(item) {
    if (this.waiting.length) this.waiting.shift()(item);
    else this.items.push(item);
  }

  next() {
    if (this.items.length) return Promise.resolve(this.items.shift());
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  async expect(sizes) {
    for (const size of sizes) {
      assert.deepEqual((await this.next())?.payload?.body, Buffer.alloc(size));
    }
  }

  async expectEnd(code = grpc.status.OK) {
    assert.equal(await this.next(), null);
    assert.equal((await this.status).code, code);
  }
}

async function clientStreaming(client) {
  const response = ok(
    single((callback) => {
      const call = client.streamingInputCall(new grpc.Metadata(), patient(), callback);
      for (const size of REQUEST_BYTES) call.write({ payload: payload(size) });
      call.end();
      return call;
    }),
  );
  assert.equal((await response).aggregatedPayloadSize, 74922);
}

async function pingPong(client) {
  const answers = new Answers(client.fullDuplexCall(new grpc.Metadata(), patient()));
  for (const [i, wanted] of RESPONSE_BYTES.entries()) {
    answers.call.write(outputRequest([wanted], REQUEST_BYTES[i]));
    await answers.expect([wanted]);
  }
  answers.call.end();
  await answers.expectEnd();
}

async function expectLargeUnary(client) {
  const response = await ok(unary(client, "unaryCall", LARGE_REQUEST));
  assert.deepEqual(response.payload.body, Buffer.alloc(LARGE_RESPONSE_BYTES));
}

async function expectStatus(client, message) {
  const responseStatus = { code: 2, message };
  const [, , status] = await unary(client, "unaryCall", { responseStatus });
  const answers = new Answers(client.fullDuplexCall(new grpc.Metadata(), patient()));
  answers.call.write({ responseStatus });
  answers.call.end();
  for (const found of [status, await answers.status]) {
    assert.equal(found.code, grpc.status.UNKNOWN);
    assert.equal(found.details, message);
  }
}

const CASES = {
  async empty_unary(client) {
    assert.deepEqual(await ok(unary(client, "emptyCall", {})), {});
  },

  large_unary: expectLargeUnary,
  client_streaming: clientStreaming,

  async server_streaming(client) {
    const call = client.streamingOutputCall(outputRequest(RESPONSE_BYTES), new grpc.Metadata(), patient());
    const answers = new Answers(call);
    await answers.expect(RESPONSE_BYTES);
    await answers.expectEnd();
  },

  ping_pong: pingPong,

  async empty_stream(client) {
    const answers = new Answers(client.fullDuplexCall(new grpc.Metadata(), patient()));
    answers.call.end();
    await answers.expectEnd();
  },

  async half_duplex(client) {
    const answers = new Answers(client.halfDuplexCall(new grpc.Metadata(), patient()));
    for (const size of RESPONSE_BYTES) answers.call.write(outputRequest([size]));
    answers.call.end();
    await answers.expect(RESPONSE_BYTES);
    await answers.expectEnd();
  },

  async cancel_after_begin(client) {
    const [, , status] = await single((callback) => {
      const call = client.streamingInputCall(new grpc.Metadata(), patient(), callback);
      call.cancel();
      return call;
    });
    assert.equal(status.code, grpc.status.CANCELLED);
  },

  async cancel_after_first_response(client) {
    const answers = new Answers(client.fullDuplexCall(new grpc.Metadata(), patient()));
    answers.call.write(outputRequest([RESPONSE_BYTES[0]], REQUEST_BYTES[0]));
    await answers.expect([RESPONSE_BYTES[0]]);
    answers.call.cancel();
    await answers.expectEnd(grpc.status.CANCELLED);
  },

  async timeout_on_sleeping_server(client) {
    for (const milliseconds of [1, 200]) {
      const options = { deadline: Date.now() + milliseconds };
      const answers = new Answers(client.fullDuplexCall(new grpc.Metadata(), options));
      answers.call.write({ responseParameters: [{ size: 1, intervalUs: 30_000_000 }] });
      await answers.expectEnd(grpc.status.DEADLINE_EXCEEDED);
    }
  },

  status_code_and_message: (client) => expectStatus(client, STATUS_MESSAGE),
  special_status_message: (client) => expectStatus(client, SPECIAL_STATUS_MESSAGE),

  async custom_metadata(client) {
    const metadata = new grpc.Metadata();
    metadata.set(...ECHO_INITIAL);
    metadata.set(...ECHO_TRAILING);
    const [response, initial, status] = await unary(client, "unaryCall", LARGE_REQUEST, metadata);
    assert.equal(response.payload.body.length, LARGE_RESPONSE_BYTES);
    const answers = new Answers(client.fullDuplexCall(metadata, patient()));
    answers.call.write(outputRequest([RESPONSE_BYTES[0]], REQUEST_BYTES[0]));
    answers.call.end();
    await answers.expect([RESPONSE_BYTES[0]]);
    await answers.expectEnd();
    for (const [before, after] of [
      [initial, status.metadata],
      [await answers.initial, (await answers.status).metadata],
    ]) {
      assert.deepEqual(before.get(ECHO_INITIAL[0]), [ECHO_INITIAL[1]]);
      assert.deepEqual(after.get(ECHO_TRAILING[0]), [ECHO_TRAILING[1]]);
    }
  },

  async unimplemented_method(client) {
    const [, , status] = await unary(client, "unimplementedCall", {});
    assert.equal(status.code, grpc.status.UNIMPLEMENTED);
  },

  async unimplemented_service(client, connect) {
    const [, , status] = await unary(connect("UnimplementedService"), "unimplementedCall", {});
    assert.equal(status.code, grpc.status.UNIMPLEMENTED);
  },

  async gzip_unary(client, connect) {
    await expectLargeUnary(connect("TestService", { "grpc.default_compression_algorithm": 2 }));
  },

  async gzip_streaming(client, connect) {
    const squeezing = connect("TestService", { "grpc.default_compression_algorithm": 2 });
    await clientStreaming(squeezing);
    await pingPong(squeezing);
  },

  // Says "begun" after the first answer, so that the test can end the server before the second.
  async finish_while_draining(client) {
    const request = { responseParameters: [{ size: 1 }, { size: 2, intervalUs: 500_000 }] };
    const answers = new Answers(client.streamingOutputCall(request, new grpc.Metadata(), patient()));
    await answers.expect([1]);
    console.log("finish_while_draining begun");
    await answers.expect([2]);
    await answers.expectEnd();
  },

  async concurrent_large_unary(client) {
    await Promise.all(Array.from({ length: CONCURRENT_CALLS }, () => expectLargeUnary(client)));
  },
};

async function runCase(name, target, credentials, settings) {
  const services = load("interop/proto/test.proto", TESTS).grpc.testing;
  const clients = [];
  const connect = (service, options = {}) => {
    const client = new services[service](target, credentials, {
      "grpc.use_local_subchannel_pool": 1,
      ...settings,
      ...options,
    });
    clients.push(client);
    return client;
  };
  try {
    await CASES[name](connect("TestService"), connect);
    console.log(`${name} ok`);
  } catch (error) {
    console.log(`${name} failed ${String(error.stack).replaceAll("\n", " | ")}`);
  } finally {
    clients.forEach((client) => client.close());
  }
}

async function predict(model, inputs, target, credentials, settings) {
  const { Inference } = load("nnproto/v1/inference.proto", path.join(TESTS, "..", "proto")).nnproto.v1;
  const client = new Inference(target, credentials, settings);
  const data = Buffer.from(inputs, "hex");
  const tensor = { shape: [data.length / 4], dtype: "DATA_TYPE_FLOAT32", data };
  const [response, , status] = await unary(client, "predict", { model, inputs: tensor });
  console.log(response ? `predict ${response.outputs.data.toString("hex")}` : `predict failed ${status.details}`);
  client.close();
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: Object.fromEntries(
      ["target", "ca", "certificate", "key", "predict", "inputs"].map((name) => [name, { type: "string" }]),
    ),
  });
  const [ca, key, certificate] = [values.ca, values.key, values.certificate].map(
    (file) => file && fs.readFileSync(file),
  );
  const credentials = ca ? grpc.credentials.createSsl(ca, key, certificate) : grpc.credentials.createInsecure();
  // The name in the server's certificate; Node.js warns of addresses as names in TLS.
  const settings = ca ? { "grpc.ssl_target_name_override": "server" } : {};
  if (values.predict) await predict(values.predict, values.inputs, values.target, credentials, settings);
  for (const name of positionals) await runCase(name, values.target, credentials, settings);
}

main();
