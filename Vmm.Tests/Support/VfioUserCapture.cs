using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Tests.Support;

/// <summary>One message of a capture.</summary>
/// <param name="Number">The message's number in the index.</param>
/// <param name="FromClient">Whether the client sent it.</param>
/// <param name="Bytes">Header and body.</param>
/// <param name="FdKinds">The kinds of its descriptors: <c>eventfd</c>, or <c>memfd</c> or <c>file</c> with a size.</param>
internal sealed record CapturedMessage(int Number, bool FromClient, byte[] Bytes, IReadOnlyList<string> FdKinds)
{
    internal int Fds => FdKinds.Count;

    internal VfioUserHeader Header { get; } = VfioUserHeader.Read(Bytes);

    internal VfioUserCommand Command => Header.Command;

    internal byte[] Body => Bytes[16..];
}

/// <summary>Reads recorded vfio-user conversations between foreign peers. They are not in this repository; a README beside them names the peers.</summary>
internal static class VfioUserCapture
{
    /// <summary>The captures' folder below <c>shared</c>, in a parent folder of the test program; null where it does not exist.</summary>
    internal static string? Folder
    {
        get
        {
            for (string? at = AppContext.BaseDirectory; at is not null; at = Path.GetDirectoryName(at))
            {
                string folder = Path.Combine(at, "shared", "golden", "vfio-user");
                if (Directory.Exists(folder)) return folder;
            }
            return null;
        }
    }

    /// <summary>Reads one capture. Without captures it skips the test, or fails it where CI is set.</summary>
    internal static List<CapturedMessage> Read(string name)
    {
        if (Folder is not { } folder)
        {
            const string reason = "the vfio-user captures (shared/golden/vfio-user) are not beside this repository";
            if (Environment.GetEnvironmentVariable("CI") is { Length: > 0 }) Assert.Fail(reason);
            Assert.Ignore(reason);
            return [];
        }
        byte[] toServer = File.ReadAllBytes(Path.Combine(folder, name + ".c2s.bin")), toClient = File.ReadAllBytes(Path.Combine(folder, name + ".s2c.bin"));
        return [.. File.ReadLines(Path.Combine(folder, name + ".index.tsv")).Skip(1).Select(line =>
        {
            string[] f = line.Split('\t');
            int offset = int.Parse(f[2], CultureInfo.InvariantCulture), length = int.Parse(f[3], CultureInfo.InvariantCulture);
            bool fromClient = f[1] == ">";
            string[] fds = f.Length > 8 && f[8].Length > 0 ? f[8].Split(',') : [];
            return new CapturedMessage(int.Parse(f[0], CultureInfo.InvariantCulture), fromClient, (fromClient ? toServer : toClient)[offset..(offset + length)], fds);
        })];
    }

    /// <summary>The client's requests in order, each with the messages up to the next request.</summary>
    internal static IEnumerable<CapturedStep> Steps(List<CapturedMessage> capture)
    {
        for (int i = 0; i < capture.Count; i++)
        {
            CapturedMessage request = capture[i];
            if (!request.FromClient || !request.Header.IsCommand) continue;
            CapturedMessage? reply = capture.Skip(i + 1).FirstOrDefault(m => !m.FromClient && m.Header.IsReply && m.Header.Id == request.Header.Id && m.Command == request.Command);
            yield return new CapturedStep(request, reply, [.. capture.Skip(i + 1).TakeWhile(static m => !m.FromClient || m.Header.IsReply).Where(m => m != reply && (m.FromClient || m.Header.IsCommand))]);
        }
    }
}

/// <summary>A request of the client, its reply, and the other messages before the next request.</summary>
internal sealed record CapturedStep(CapturedMessage Request, CapturedMessage? Reply, List<CapturedMessage> After);
