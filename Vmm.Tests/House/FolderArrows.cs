using System.Collections.Immutable;
using System.Reflection.Emit;
using System.Reflection.Metadata;
using System.Reflection.Metadata.Ecma335;
using System.Reflection.PortableExecutable;
using System.Text.RegularExpressions;

namespace Vmm.Tests.House;

/// <summary>One folder uses a type of another: an arrow of the drawing in docs/architecture.md.</summary>
internal sealed record FolderArrow(string From, string To, string User, string Used);

/// <summary>Finds the arrows between the folders of an assembly. A folder's name is its namespace without the assembly's; "." is the top folder.</summary>
internal static partial class FolderArrows
{
    private static readonly Dictionary<int, OpCode> s_opCodes =
        typeof(OpCodes).GetFields().Select(static f => (OpCode)f.GetValue(null)!).ToDictionary(static o => (int)(ushort)o.Value);

    /// <summary>Arrows in metadata and IL of the built assembly: base types, attributes, signatures, locals, calls, field accesses.</summary>
    public static IReadOnlyCollection<FolderArrow> InAssembly(string path, string rootNamespace)
    {
        using var file = new PEReader(File.OpenRead(path));
        MetadataReader metadata = file.GetMetadataReader();
        var arrows = new HashSet<FolderArrow>();
        foreach (TypeDefinitionHandle handle in metadata.TypeDefinitions)
        {
            (string? folder, string user) = Place(metadata, handle, rootNamespace);
            if (folder is null) continue;
            var used = new UsedTypes(metadata);
            used.AddType(handle);
            foreach (MethodDefinitionHandle method in metadata.GetTypeDefinition(handle).GetMethods())
            {
                int address = metadata.GetMethodDefinition(method).RelativeVirtualAddress;
                if (address != 0) AddBody(file.GetMethodBody(address), used);
            }
            foreach (TypeDefinitionHandle other in used.Types)
            {
                (string? to, string name) = Place(metadata, other, rootNamespace);
                if (to is not null && to != folder) arrows.Add(new FolderArrow(folder, to, user, name));
            }
        }
        return arrows;
    }

    /// <summary>Arrows in using directives. The assembly lacks uses of constants, because the compiler copies their values.</summary>
    public static IReadOnlyCollection<FolderArrow> InSources(IReadOnlyCollection<string> files, string rootNamespace)
    {
        var sources = files.Select(static f => (File: Path.GetFileName(f), Text: File.ReadAllText(f))).Select(static s => (s.File, s.Text, Namespace: NamespaceOf(s.Text))).ToList();
        HashSet<string> namespaces = [.. sources.Select(static s => s.Namespace)];
        var arrows = new HashSet<FolderArrow>();
        foreach ((string file, string text, string from) in sources)
        {
            foreach (string name in UsingDirective().Matches(text).Select(static m => m.Groups[1].Value))
            {
                // 'using static' and an alias may name a type, whose namespace stands before the last dot.
                string used = namespaces.Contains(name) ? name : name[..Math.Max(0, name.LastIndexOf('.'))];
                if (used != from && namespaces.Contains(used) && Folder(from, rootNamespace) is { } user && Folder(used, rootNamespace) is { } other)
                {
                    arrows.Add(new FolderArrow(user, other, file, $"using {name}"));
                }
            }
        }
        return arrows;
    }

    /// <summary>The file-scoped namespace of a source file; empty when it has none.</summary>
    public static string NamespaceOf(string text) => FileNamespace().Match(text).Groups[1].Value;

    private static void AddBody(MethodBodyBlock body, UsedTypes used)
    {
        if (!body.LocalSignature.IsNil) used.Add(body.LocalSignature);
        foreach (ExceptionRegion region in body.ExceptionRegions)
        {
            if (region.Kind == ExceptionRegionKind.Catch) used.Add(region.CatchType);
        }
        BlobReader il = body.GetILReader();
        while (il.RemainingBytes > 0)
        {
            int code = il.ReadByte();
            if (code == 0xfe) code = (code << 8) | il.ReadByte();
            switch (s_opCodes[code].OperandType)
            {
                case OperandType.InlineNone: break;
                case OperandType.ShortInlineBrTarget or OperandType.ShortInlineI or OperandType.ShortInlineVar: il.Offset += 1; break;
                case OperandType.InlineVar: il.Offset += 2; break;
                case OperandType.InlineI8 or OperandType.InlineR: il.Offset += 8; break;
                case OperandType.InlineSwitch:
                    int targets = il.ReadInt32();
                    il.Offset += 4 * targets;
                    break;
                case OperandType.InlineField or OperandType.InlineMethod or OperandType.InlineTok or OperandType.InlineType:
                    used.Add(MetadataTokens.EntityHandle(il.ReadInt32())); break;
                default: il.Offset += 4; break;
            }
        }
    }

    /// <summary>Folder and name of the outermost type around a type, because closures and state machines belong to the type that contains their code.</summary>
    private static (string? Folder, string Name) Place(MetadataReader metadata, TypeDefinitionHandle handle, string rootNamespace)
    {
        TypeDefinition type = metadata.GetTypeDefinition(handle);
        while (!type.GetDeclaringType().IsNil) type = metadata.GetTypeDefinition(type.GetDeclaringType());
        return (Folder(metadata.GetString(type.Namespace), rootNamespace), metadata.GetString(type.Name));
    }

    private static string? Folder(string name, string rootNamespace) =>
        name == rootNamespace ? "." : name.StartsWith(rootNamespace + ".", StringComparison.Ordinal) ? name[(rootNamespace.Length + 1)..] : null;

    [GeneratedRegex(@"^namespace ([\w.]+)", RegexOptions.Multiline)]
    private static partial Regex FileNamespace();

    [GeneratedRegex(@"^using (?:static )?(?:\w+ = )?([\w.]+);", RegexOptions.Multiline)]
    private static partial Regex UsingDirective();

    /// <summary>Collects the types of the assembly that handles and signatures name.</summary>
    private sealed class UsedTypes(MetadataReader metadata) : ISignatureTypeProvider<object?, object?>
    {
        public HashSet<TypeDefinitionHandle> Types { get; } = [];

        /// <summary>The types that a type names outside its method bodies.</summary>
        public void AddType(TypeDefinitionHandle handle)
        {
            TypeDefinition type = metadata.GetTypeDefinition(handle);
            Add(type.BaseType);
            AddConstraints(type.GetGenericParameters());
            AddAttributes(type.GetCustomAttributes());
            foreach (InterfaceImplementationHandle i in type.GetInterfaceImplementations()) Add(metadata.GetInterfaceImplementation(i).Interface);
            foreach (FieldDefinitionHandle f in type.GetFields())
            {
                Add(f);
                AddAttributes(metadata.GetFieldDefinition(f).GetCustomAttributes());
            }
            foreach (PropertyDefinitionHandle p in type.GetProperties()) AddAttributes(metadata.GetPropertyDefinition(p).GetCustomAttributes());
            foreach (MethodDefinitionHandle m in type.GetMethods())
            {
                Add(m);
                AddConstraints(metadata.GetMethodDefinition(m).GetGenericParameters());
                AddAttributes(metadata.GetMethodDefinition(m).GetCustomAttributes());
            }
        }

        public void Add(EntityHandle handle)
        {
            if (handle.IsNil) return;
            switch (handle.Kind)
            {
                case HandleKind.TypeDefinition: Types.Add((TypeDefinitionHandle)handle); break;
                case HandleKind.TypeSpecification: metadata.GetTypeSpecification((TypeSpecificationHandle)handle).DecodeSignature(this, null); break;
                case HandleKind.StandaloneSignature: metadata.GetStandaloneSignature((StandaloneSignatureHandle)handle).DecodeLocalSignature(this, null); break;
                case HandleKind.FieldDefinition:
                    FieldDefinition field = metadata.GetFieldDefinition((FieldDefinitionHandle)handle);
                    Types.Add(field.GetDeclaringType());
                    field.DecodeSignature(this, null);
                    break;
                case HandleKind.MethodDefinition:
                    MethodDefinition method = metadata.GetMethodDefinition((MethodDefinitionHandle)handle);
                    Types.Add(method.GetDeclaringType());
                    method.DecodeSignature(this, null);
                    break;
                case HandleKind.MemberReference:
                    MemberReference member = metadata.GetMemberReference((MemberReferenceHandle)handle);
                    Add(member.Parent);
                    if (member.GetKind() == MemberReferenceKind.Field) member.DecodeFieldSignature(this, null);
                    else member.DecodeMethodSignature(this, null);
                    break;
                case HandleKind.MethodSpecification:
                    MethodSpecification specification = metadata.GetMethodSpecification((MethodSpecificationHandle)handle);
                    Add(specification.Method);
                    specification.DecodeSignature(this, null);
                    break;
                default: break; // The type belongs to another assembly.
            }
        }

        private void AddAttributes(CustomAttributeHandleCollection attributes)
        {
            foreach (CustomAttributeHandle a in attributes) Add(metadata.GetCustomAttribute(a).Constructor);
        }

        private void AddConstraints(GenericParameterHandleCollection parameters)
        {
            foreach (GenericParameterConstraintHandle c in parameters.SelectMany(p => metadata.GetGenericParameter(p).GetConstraints()))
            {
                Add(metadata.GetGenericParameterConstraint(c).Type);
            }
        }

        public object? GetTypeFromDefinition(MetadataReader reader, TypeDefinitionHandle handle, byte rawTypeKind)
        {
            Types.Add(handle);
            return null;
        }

        public object? GetTypeFromSpecification(MetadataReader reader, object? genericContext, TypeSpecificationHandle handle, byte rawTypeKind)
        {
            Add(handle);
            return null;
        }

        public object? GetTypeFromReference(MetadataReader reader, TypeReferenceHandle handle, byte rawTypeKind) => null;

        public object? GetPrimitiveType(PrimitiveTypeCode typeCode) => null;

        public object? GetGenericMethodParameter(object? genericContext, int index) => null;

        public object? GetGenericTypeParameter(object? genericContext, int index) => null;

        public object? GetArrayType(object? elementType, ArrayShape shape) => null;

        public object? GetSZArrayType(object? elementType) => null;

        public object? GetByReferenceType(object? elementType) => null;

        public object? GetPointerType(object? elementType) => null;

        public object? GetPinnedType(object? elementType) => null;

        public object? GetModifiedType(object? modifier, object? unmodifiedType, bool isRequired) => null;

        public object? GetFunctionPointerType(MethodSignature<object?> signature) => null;

        public object? GetGenericInstantiation(object? genericType, ImmutableArray<object?> typeArguments) => null;
    }
}
