// What a program with OpenAI's Node client does, one action a run: node node_client.cjs ACTION. Prints one line of JSON.
// KOTAE_URL and KOTAE_TOKEN say where and as whom; NODE_PATH where the package is. Driven by test_node_client.py.
"use strict";

const OpenAI = require("openai");

const client = new OpenAI({
  baseURL: `${process.env.KOTAE_URL}/v1`,
  apiKey: process.env.KOTAE_TOKEN,
  maxRetries: 0,
  timeout: 60_000,
});
const question = JSON.parse(process.env.KOTAE_QUESTION ?? "{}");

const actions = {
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    return { names };
  },

  async stream() {
    const told = { id: "", text: "", finish: null, usage: null };
    const stream = await client.chat.completions.create({
      ...question,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) read(chunk, told);
    return told;
  },

  // The stop button of a page: abort the request after the first words.
  async abort() {
    const told = { id: "", text: "", finish: null };
    const stream = await client.chat.completions.create({ ...question, stream: true });
    for await (const chunk of stream) {
      read(chunk, told);
      if (told.text) stream.controller.abort();
    }
    return told;
  },

  // A program that has heard enough: the client closes the stream when its loop is left.
  async leave() {
    const told = { id: "", text: "", finish: null };
    const stream = await client.chat.completions.create({ ...question, stream: true });
    for await (const chunk of stream) {
      read(chunk, told);
      if (told.text) break;
    }
    return told;
  },

  async refused() {
    try {
      await client.chat.completions.create(question);
    } catch (error) {
      return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
    }
    return { name: "nothing was refused" };
  },
};

function read(chunk, told) {
  told.id = chunk.id;
  if (chunk.usage) told.usage = chunk.usage;
  for (const choice of chunk.choices) {
    told.text += choice.delta.content ?? "";
    told.finish = choice.finish_reason ?? told.finish;
  }
}

actions[process.argv[2]]().then(
  (told) => console.log(JSON.stringify(told)),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
