// Calls a patchclamp server from Node with nothing but the published protos: describes the model, runs a prompt with
// one read, decodes the tensor from its bytes, and sends one bad request to see that the error's details are readable.
// Prints what it found as JSON.
//
//   node client.mjs HOST:PORT PROMPT SITE LAYER

import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { crc32 } from "node:zlib";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const here = dirname(fileURLToPath(import.meta.url));
const DEADLINE_MS = 60_000;

const definition = protoLoader.loadSync(["patchclamp/v1/model.proto", "patchclamp/v1/run.proto"], {
  includeDirs: [join(here, "../../protos")],
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
  oneofs: true,
});
const { ModelService, RunService } = grpc.loadPackageDefinition(definition).patchclamp.v1;
const rpc = new protobuf.Root().loadSync(join(here, "google_rpc.proto"), { keepCase: true });

const deadline = () => ({ deadline: Date.now() + DEADLINE_MS });

function describe(models) {
  return new Promise((resolve, reject) => {
    models.Describe({}, deadline(), (error, response) => (error ? reject(error) : resolve(response)));
  });
}

// Every event of the stream; rejects with the call's status.
function run(runs, request) {
  return new Promise((resolve, reject) => {
    const events = [];
    runs
      .Run(request, deadline())
      .on("data", (response) => events.push(response))
      .on("error", reject)
      .on("end", () => resolve(events));
  });
}

// The elements of a float32 tensor, whether its bytes came inline or as chunks of the same stream.
function float32(tensor, events) {
  if (tensor.dtype !== "DTYPE_FLOAT32") throw new Error(`expected float32, got ${tensor.dtype}`);
  let bytes = tensor.inline;
  if (tensor.content === "streamed") {
    const chunks = events
      .filter(({ event, chunk }) => event === "chunk" && chunk.tensor_id === tensor.streamed.tensor_id)
      .map(({ chunk }) => chunk);
    bytes = Buffer.alloc(tensor.streamed.total_bytes);
    for (const chunk of chunks) chunk.data.copy(bytes, chunk.offset);
    if (crc32(bytes) !== chunks.at(-1).crc32) throw new Error("the checksum does not fit the bytes");
  }
  const size = tensor.shape.reduce((product, axis) => product * axis, 1);
  if (bytes.length !== 4 * size) throw new Error(`${bytes.length} bytes for a shape of ${tensor.shape}`);
  return Array.from({ length: size }, (_, i) => bytes.readFloatLE(4 * i));
}

// The google.rpc details of a failed call.
function details(error) {
  const [binary] = error.metadata.get("grpc-status-details-bin");
  if (binary === undefined) throw new Error(`no details in: ${error.message}`);
  const found = {};
  for (const any of rpc.lookupType("google.rpc.Status").decode(binary).details) {
    const name = any.type_url.split("/").pop();
    const type = rpc.root.lookup(name);
    found[name] = type ? type.toObject(type.decode(any.value), { defaults: true }) : null;
  }
  return found;
}

async function refused(runs, request) {
  try {
    await run(runs, request);
  } catch (error) {
    return { code: grpc.status[error.code], message: error.details, details: details(error) };
  }
  throw new Error("a bad request was served");
}

async function main([address, prompt, site, layer]) {
  const credentials = grpc.credentials.createInsecure();
  const models = new ModelService(address, credentials);
  const runs = new RunService(address, credentials);
  try {
    const { model, sites } = await describe(models);
    const read = { hook_point: { site, layer: Number(layer) }, dtype: "DTYPE_FLOAT32" };
    const events = await run(runs, { runs: [{ prompt: { text: prompt }, reads: [read] }] });
    const { result } = events.find(({ event }) => event === "result");
    if (result.failure) throw new Error(`the run failed: ${JSON.stringify(result.failure)}`);
    if (!events.at(-1).summary) throw new Error("the stream did not end with a summary");
    const { name, values } = result.reads[0];
    const found = {
      model: model.name,
      dims: model.dims,
      sites: sites.map((info) => info.name),
      tokens: result.tokens.map((token) => token.id),
      name,
      shape: values.shape,
      values: float32(values, events),
      // No prompt, and a read that names no site: two violations at once.
      refused: await refused(runs, { runs: [{ reads: [{ hook_point: {} }] }] }),
    };
    process.stdout.write(`${JSON.stringify(found)}\n`);
  } finally {
    models.close();
    runs.close();
  }
}

await main(process.argv.slice(2));
