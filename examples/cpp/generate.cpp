// Writes on from a prompt with a gpt2-edge package, on onnxruntime-genai's C++ API: text comes as it is written.
//
//     generate PACKAGE PROMPT [--new-tokens N] [--greedy]

#include <ort_genai.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>

struct Request {
  std::string package, prompt;
  int new_tokens = 128;
  bool greedy = false;  // otherwise the package's own sampling: temperature 1, top-k 40
};

Request parse(int argc, char** argv) {
  if (argc < 3) throw std::invalid_argument("usage: generate PACKAGE PROMPT [--new-tokens N] [--greedy]");
  Request request{argv[1], argv[2]};
  for (int i = 3; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--greedy") {
      request.greedy = true;
    } else if (word == "--new-tokens" && i + 1 < argc && std::atoi(argv[i + 1]) > 0) {
      request.new_tokens = std::atoi(argv[++i]);
    } else {
      throw std::invalid_argument(word + ": expected --greedy or --new-tokens N, N at least 1");
    }
  }
  return request;
}

void write(const Request& request) {
  const auto model = OgaModel::Create(request.package.c_str());
  const auto tokenizer = OgaTokenizer::Create(*model);
  const auto stream = OgaTokenizerStream::Create(*tokenizer);

  const auto prompt = OgaSequences::Create();
  tokenizer->Encode(request.prompt.c_str(), *prompt);

  // The length is that of the cache too: prompt and new tokens, and no more than the model's context.
  const auto params = OgaGeneratorParams::Create(*model);
  params->SetSearchOption("max_length", static_cast<double>(prompt->SequenceCount(0) + request.new_tokens));
  if (request.greedy) params->SetSearchOptionBool("do_sample", false);

  const auto generator = OgaGenerator::Create(*model, *params);
  generator->AppendTokenSequences(*prompt);
  while (!generator->IsDone()) {
    generator->GenerateNextToken();
    const auto newest = generator->GetSequenceData(0)[generator->GetSequenceCount(0) - 1];
    std::cout << stream->Decode(newest) << std::flush;
  }
  std::cout << std::endl;
}

int main(int argc, char** argv) try {
  OgaHandle shuts_down_at_the_end;
  write(parse(argc, argv));
} catch (const std::exception& error) {
  std::cerr << "generate: " << error.what() << std::endl;
  return 2;
}
