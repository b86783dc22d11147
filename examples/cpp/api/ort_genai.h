// The part of onnxruntime-genai's C++ API that generate.cpp uses, written for this example.
//
// For a machine that has the library from the Python package, which comes without headers. Where onnxruntime-genai's own
// ort_genai.h is found, CMakeLists.txt takes that one, and generate.cpp is the same.
//
// Functions of the C interface return null, or a result that says what failed and that the caller destroys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;

extern "C" {
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
void OgaShutdown();

OgaResult* OgaCreateModel(const char* package, OgaModel**);
void OgaDestroyModel(OgaModel*);

OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
void OgaDestroyTokenizer(OgaTokenizer*);

OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t id, const char** text);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);

OgaResult* OgaCreateSequences(OgaSequences**);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t index);
void OgaDestroySequences(OgaSequences*);

OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double);
OgaResult* OgaGeneratorParamsSetSearchBool(OgaGeneratorParams*, const char* name, bool);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);

OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
size_t OgaGenerator_GetSequenceCount(const OgaGenerator*, size_t index);
const int32_t* OgaGenerator_GetSequenceData(const OgaGenerator*, size_t index);
void OgaDestroyGenerator(OgaGenerator*);
}

namespace oga_detail {

inline void check(OgaResult* result) {
  if (result == nullptr) return;
  const std::unique_ptr<OgaResult, void (*)(OgaResult*)> owned(result, OgaDestroyResult);
  throw std::runtime_error(OgaResultGetError(result));
}

// What a function of the C interface creates and writes to its argument.
template <typename T, typename Create>
std::unique_ptr<T> made(Create create) {
  T* made = nullptr;
  check(create(&made));
  return std::unique_ptr<T>(made);
}

}  // namespace oga_detail

// Each class is the C object of the same name: its pointer is the C pointer, and deleting it destroys the C object.

struct OgaModel {
  static std::unique_ptr<OgaModel> Create(const char* package) {
    return oga_detail::made<OgaModel>([&](OgaModel** out) { return OgaCreateModel(package, out); });
  }
  static void operator delete(void* model) { OgaDestroyModel(static_cast<OgaModel*>(model)); }
};

struct OgaSequences {
  static std::unique_ptr<OgaSequences> Create() { return oga_detail::made<OgaSequences>(OgaCreateSequences); }
  size_t SequenceCount(size_t index) const { return OgaSequencesGetSequenceCount(this, index); }
  static void operator delete(void* sequences) { OgaDestroySequences(static_cast<OgaSequences*>(sequences)); }
};

struct OgaTokenizer {
  static std::unique_ptr<OgaTokenizer> Create(const OgaModel& model) {
    return oga_detail::made<OgaTokenizer>([&](OgaTokenizer** out) { return OgaCreateTokenizer(&model, out); });
  }
  void Encode(const char* text, OgaSequences& into) const { oga_detail::check(OgaTokenizerEncode(this, text, &into)); }
  static void operator delete(void* tokenizer) { OgaDestroyTokenizer(static_cast<OgaTokenizer*>(tokenizer)); }
};

struct OgaTokenizerStream {
  static std::unique_ptr<OgaTokenizerStream> Create(const OgaTokenizer& tokenizer) {
    return oga_detail::made<OgaTokenizerStream>(
        [&](OgaTokenizerStream** out) { return OgaCreateTokenizerStream(&tokenizer, out); });
  }
  const char* Decode(int32_t id) {
    const char* text = nullptr;
    oga_detail::check(OgaTokenizerStreamDecode(this, id, &text));
    return text;
  }
  static void operator delete(void* stream) { OgaDestroyTokenizerStream(static_cast<OgaTokenizerStream*>(stream)); }
};

struct OgaGeneratorParams {
  static std::unique_ptr<OgaGeneratorParams> Create(const OgaModel& model) {
    return oga_detail::made<OgaGeneratorParams>(
        [&](OgaGeneratorParams** out) { return OgaCreateGeneratorParams(&model, out); });
  }
  void SetSearchOption(const char* name, double value) {
    oga_detail::check(OgaGeneratorParamsSetSearchNumber(this, name, value));
  }
  void SetSearchOptionBool(const char* name, bool value) {
    oga_detail::check(OgaGeneratorParamsSetSearchBool(this, name, value));
  }
  static void operator delete(void* params) { OgaDestroyGeneratorParams(static_cast<OgaGeneratorParams*>(params)); }
};

struct OgaGenerator {
  static std::unique_ptr<OgaGenerator> Create(const OgaModel& model, OgaGeneratorParams& params) {
    return oga_detail::made<OgaGenerator>([&](OgaGenerator** out) { return OgaCreateGenerator(&model, &params, out); });
  }
  void AppendTokenSequences(const OgaSequences& sequences) {
    oga_detail::check(OgaGenerator_AppendTokenSequences(this, &sequences));
  }
  bool IsDone() { return OgaGenerator_IsDone(this); }
  void GenerateNextToken() { oga_detail::check(OgaGenerator_GenerateNextToken(this)); }
  size_t GetSequenceCount(size_t index) const { return OgaGenerator_GetSequenceCount(this, index); }
  const int32_t* GetSequenceData(size_t index) const { return OgaGenerator_GetSequenceData(this, index); }
  static void operator delete(void* generator) { OgaDestroyGenerator(static_cast<OgaGenerator*>(generator)); }
};

struct OgaHandle {
  ~OgaHandle() noexcept { OgaShutdown(); }
};
