// Reads a request (jobs.mjs) on stdin, with the folder of its package in `folder`; writes the answer on stdout.
import { text } from "node:stream/consumers";

import * as transformers from "@huggingface/transformers";

import { answer } from "./jobs.mjs";

const request = JSON.parse(await text(process.stdin));
Object.assign(transformers.env, { allowRemoteModels: false, useFSCache: false, localModelPath: request.folder });
process.stdout.write(JSON.stringify(await answer(transformers, request)));
