// llama.cpp as the prebuilt binary of node-llama-cpp: one request a line on stdin, one answer a line on stdout.
// node steps.mjs PACKAGE MODEL.gguf THREADS CONTEXT, PACKAGE being the folder that node-llama-cpp is installed in.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, modelPath, threads, contextSize] = process.argv.slice(2);
const entry = createRequire(`${folder}/`).resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, maxThreads: Number(threads), logLevel: LlamaLogLevel.error,
});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: Number(contextSize), batchSize: Number(contextSize), threads: Number(threads), sequences: 1,
});
const sequence = context.getSequence();

const wanted = {
    // The whole prompt into an empty cache, without what follows it: milliseconds.
    async prefill({ids}) {
        await sequence.clearHistory();
        const started = performance.now();
        await sequence.evaluateWithoutGeneratingNewTokens(ids);
        return performance.now() - started;
    },
    // One token after another, each at the same length: milliseconds of each.
    async steps({ids}) {
        const found = [], length = sequence.nextTokenIndex;
        for (const id of ids) {
            const started = performance.now();
            await sequence.evaluate([id], {temperature: 0}).next();
            found.push(performance.now() - started);
            await sequence.eraseContextTokenRanges([{start: length, end: sequence.nextTokenIndex}]);
        }
        return found;
    },
    // Probabilities of what follows `ids`: pairs of token and probability.
    async probabilities({ids}) {
        await sequence.clearHistory();
        const last = ids.length - 1;
        const input = ids.map((id, index) => (index < last ? id : [id, {generateNext: {probabilities: true}}]));
        const output = await sequence.controlledEvaluate(input);
        return [...output[last].next.probabilities];
    },
};

console.log(JSON.stringify({ready: llama.cpuMathCores}));
for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    console.log(JSON.stringify(await wanted[request.wanted](request)));
}
