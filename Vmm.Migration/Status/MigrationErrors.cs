using System.Diagnostics.CodeAnalysis;
using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;
using Vmm.Core.Errors;

namespace Vmm.Migration.Status;

/// <summary>Makes the error record of a failed migration, and its JSON for the return path.</summary>
internal static partial class MigrationErrors
{
    internal static MigrationError From(string side, string phase, Exception error, string? section = null)
    {
        if (error is RemoteMigrationException remote) return remote.Error;
        VmmException? inner = Innermost(error);
        return new MigrationError
        {
            Side = side,
            Phase = phase,
            Message = VmmException.Describe(error),
            Section = (inner as StreamFormatException)?.Section ?? (inner as IncompatibleStateException)?.Section ?? section,
            Offset = (inner as StreamFormatException)?.Offset ?? (inner as IncompatibleStateException)?.Offset ?? (inner as StreamTruncatedException)?.Offset,
            Expected = (inner as StreamFormatException)?.Expected ?? (inner as IncompatibleStateException)?.Expected,
            Found = (inner as StreamFormatException)?.Found ?? (inner as IncompatibleStateException)?.Found,
            Hint = inner?.Hint,
        };
    }

    /// <summary>The record as at most <paramref name="maxBytes"/> of JSON; a message that is too long is cut.</summary>
    internal static byte[] ToWire(MigrationError error, int maxBytes)
    {
        byte[] bytes = JsonSerializer.SerializeToUtf8Bytes(error, ErrorJson.Default.MigrationError);
        if (bytes.Length <= maxBytes) return bytes;
        error = error with { Expected = null, Found = null, Hint = null };
        bytes = JsonSerializer.SerializeToUtf8Bytes(error, ErrorJson.Default.MigrationError);
        int over = bytes.Length - maxBytes;
        if (over <= 0) return bytes;
        string message = error.Message[..Math.Max(0, error.Message.Length - over - 3)] + "...";
        bytes = JsonSerializer.SerializeToUtf8Bytes(error with { Message = message }, ErrorJson.Default.MigrationError);
        return bytes.Length <= maxBytes ? bytes : [];
    }

    /// <summary>Reads a record that a peer sent.</summary>
    /// <returns>Null if the bytes are not a whole record.</returns>
    internal static MigrationError? FromWire(ReadOnlySpan<byte> bytes)
    {
        try
        {
            MigrationError? error = JsonSerializer.Deserialize(bytes, ErrorJson.Default.MigrationError);
            // A peer's text is shown on terminals and in logs, so it must be one printable line.
            return error is null ? null : error with
            {
                Message = Clean(error.Message), Side = Clean(error.Side), Phase = Clean(error.Phase), Hint = Clean(error.Hint),
                Section = Clean(error.Section), Expected = Clean(error.Expected), Found = Clean(error.Found),
            };
        }
        catch (JsonException)
        {
            return null;
        }
    }

    [return: NotNullIfNotNull(nameof(text))]
    private static string? Clean(string? text)
    {
        if (text is null) return null;
        var clean = new StringBuilder(text.Length);
        foreach (char c in text) clean.Append(char.IsControl(c) ? ' ' : c);
        return clean.ToString();
    }

    private static VmmException? Innermost(Exception error)
    {
        VmmException? found = null;
        for (Exception? e = error; e is not null; e = e.InnerException)
            if (e is VmmException vmm and not (MigrationFailedException or DeviceStateException)) found = vmm;
        return found ?? error as VmmException;
    }

    [JsonSourceGenerationOptions(
        PropertyNamingPolicy = JsonKnownNamingPolicy.KebabCaseLower, DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull, RespectNullableAnnotations = true)]
    [JsonSerializable(typeof(MigrationError))]
    private sealed partial class ErrorJson : JsonSerializerContext;
}

/// <summary>Carries an error record that the other side wrote.</summary>
internal sealed class RemoteMigrationException(MigrationError error) : Exception(error.ToString())
{
    internal MigrationError Error { get; } = error;
}
